"""Guide decoding by a regular expression on a vLLM without `GuidedDecodingParams`.

vLLM 0.12 removed the class and the `guided_decoding` field of `SamplingParams` in favour of `StructuredOutputsParams`
and `structured_outputs`. TRL 0.18-0.26 import the class at the head of their trainers, so none of them can be imported
with a newer vLLM. TRL 0.27 chooses by the version of vLLM.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, bound_to_hook, hook, imports, is_text
from trlpatch.rewrite.patch import Patch, variants

_CLASS = "GuidedDecodingParams"
_FIELD = "guided_decoding"

IMPORT = Anchor(
    "guided_import",
    hint=_CLASS,
    prefilter=(f"import {_CLASS}",),
    at_module_level=True,
)
FIELD = Anchor(
    "guided_field",
    hint=_FIELD,
    prefilter=(f'"{_FIELD}"', f"{_FIELD}="),
)


class GuidedDecoding(PatchTransformer):
    """Let hooks say which class and which field this vLLM has: as a keyword, a dictionary's key or a subscript."""

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom | cst.Assign:
        if not imports(updated_node, "vllm.sampling_params", _CLASS):
            return updated_node
        self.hits[IMPORT] += 1
        return bound_to_hook(hook("guided_decoding_params"), _CLASS)

    def leave_DictElement(self, original_node: cst.DictElement, updated_node: cst.DictElement) -> cst.BaseDictElement:
        if not is_text(updated_node.key, _FIELD):
            return updated_node
        return updated_node.with_changes(key=self._field())

    def leave_Index(self, original_node: cst.Index, updated_node: cst.Index) -> cst.Index:
        if not is_text(updated_node.value, _FIELD):
            return updated_node
        return updated_node.with_changes(value=self._field())

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        if updated_node.keyword is None or updated_node.keyword.value != _FIELD:
            return updated_node
        named = cst.Dict([cst.DictElement(self._field(), updated_node.value)])
        return updated_node.with_changes(keyword=None, equal=cst.MaybeSentinel.DEFAULT, star="**", value=named)

    def _field(self) -> cst.Call:
        self.hits[FIELD] += 1
        return hook("guided_decoding_field")


_BOTH = {IMPORT: 1, FIELD: 1}

PATCH = Patch(
    name="guided_decoding",
    summary="trainers can be imported, and guided decoding works, with vLLM 0.12 and newer",
    hooks=("guided_decoding_params", "guided_decoding_field"),
    transformer=GuidedDecoding,
    variants=variants(
        {
            "grpo": {">=0.18,<0.27": _BOTH},
            "rloo": {">=0.22,<0.27": _BOTH},
            "online_dpo": {">=0.23,<0.27": _BOTH},
            "gold": {">=0.25,<0.27": _BOTH},
            "openenv": {">=0.26,<0.27": _BOTH},
        }
    ),
)
