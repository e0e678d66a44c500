"""Import TRL 0.26 with a vLLM that has no module `vllm.transformers_utils.tokenizer`.

`import trl` overwrites `get_cached_tokenizer` there, for transformers 5. vLLM 0.12 needs that no longer
(vllm #29686), vLLM 0.19 still has the module, 0.23 does not.
"""

from __future__ import annotations

import ast

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, dotted, hook
from trlpatch.rewrite.patch import Patch, variants

_FUNCTION = "get_cached_tokenizer"
_MODULE = "vllm.transformers_utils.tokenizer"

IMPORT = Anchor(
    "tokenizer_import",
    hint=r"transformers_utils",
    sign=lambda node: isinstance(node, ast.Import) and any(alias.name == _MODULE for alias in node.names),
    prefilter=(f"import {_MODULE}",),
    at_module_level=True,
)
OVERWRITE = Anchor(
    "tokenizer_overwrite",
    hint=_FUNCTION,
    sign=lambda node: isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"{_MODULE}.{_FUNCTION}",
    prefilter=(f"{_MODULE}.{_FUNCTION} =",),
    at_module_level=True,
)


class VllmTokenizer(PatchTransformer):
    """Ask the hook for the module, in the import and where TRL assigns to it."""

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import | cst.Expr:
        if [dotted(alias.name) for alias in updated_node.names] != [_MODULE]:
            return updated_node
        self.hits[IMPORT] += 1
        return cst.Expr(hook("vllm_tokenizer"))

    def leave_AssignTarget(self, original_node: cst.AssignTarget, updated_node: cst.AssignTarget) -> cst.AssignTarget:
        target = updated_node.target
        if not isinstance(target, cst.Attribute) or dotted(target.value) != _MODULE:
            return updated_node
        self.hits[OVERWRITE] += 1
        return updated_node.with_changes(target=target.with_changes(value=hook("vllm_tokenizer")))


PATCH = Patch(
    name="vllm_tokenizer",
    summary="`import trl` works with a vLLM that has no vllm.transformers_utils.tokenizer",
    hooks=("vllm_tokenizer",),
    transformer=VllmTokenizer,
    variants=variants({"trl": {">=0.26,<0.27": {IMPORT: 1, OVERWRITE: 1}}}),
)
