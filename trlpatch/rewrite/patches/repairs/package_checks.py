"""Check with `_is_package_available` so that an absent package is not taken for installed.

TRL up to 0.28 asks transformers' private `_is_package_available`, which returns a tuple, always true, from
transformers 5.3 on. `from trl import GRPOTrainer` then fails with `No module named 'vllm_ascend'`, `'mergekit'` ...
TRL 0.29 brought its own.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import HOOKS, PatchTransformer, bound_to_hook, imports, imports_from
from trlpatch.rewrite.patch import Patch, variants

_MODULE = "transformers.utils.import_utils"
_NAME = "_is_package_available"

IMPORT = Anchor(
    "package_check_import",
    hint=r"_is_package_available",
    sign=lambda node: imports_from(node, _MODULE, _NAME),
    prefilter=(f"import {_NAME}",),
    at_module_level=True,
)


class PackageChecks(PatchTransformer):
    """Put the hook in the place of the imported function."""

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom | cst.Assign:
        if not imports(updated_node, _MODULE, _NAME):
            return updated_node
        self.hits[IMPORT] += 1
        return bound_to_hook(cst.Attribute(cst.Name(HOOKS), cst.Name("is_package_available")), _NAME)


PATCH = Patch(
    name="package_checks",
    summary="a package that is not installed is not taken for installed with transformers 5.3 and newer",
    hooks=("is_package_available",),
    transformer=PackageChecks,
    variants=variants({"import_utils": {">=0.18,<0.29": {IMPORT: 1}}}),
)
