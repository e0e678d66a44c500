"""Import the trainers where `requests` is not installed.

TRL 0.28.0-1.14.1 import `requests.adapters` at the head of the server client, which every trainer imports, and do not
declare `requests`; the newest huggingface-hub and datasets bring it no longer. The client itself still asks for it
when it is built. TRL 1.14.2 moved the import under its own test.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, bound_to_hook, hook, imports, imports_from
from trlpatch.rewrite.patch import Patch, variants

IMPORT = Anchor(
    "adapter_import",
    hint=r"\brequests\b",
    sign=lambda node: imports_from(node, "requests.adapters"),
    prefilter=("from requests.adapters import",),
    at_module_level=True,
)


class WithoutRequests(PatchTransformer):
    """Put what the hook finds in the place of the import."""

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom | cst.Assign:
        if not imports(updated_node, "requests.adapters", "HTTPAdapter"):
            return updated_node
        self.hits[IMPORT] += 1
        return bound_to_hook(hook("http_adapter"), "HTTPAdapter")


PATCH = Patch(
    name="without_requests",
    summary="trainers can be imported where the package requests is not installed",
    hooks=("http_adapter",),
    transformer=WithoutRequests,
    variants=variants({"vllm_client": {">=0.28,<1.14.2": {IMPORT: 1}}}),
)
