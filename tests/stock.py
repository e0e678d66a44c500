"""What stock TRL of some age needs to be imported beside the vLLM and transformers of today.

Patched TRL needs none of it; comparisons with stock TRL do.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any
from unittest import mock

from trlpatch.source.locate import find_trl


def hide_vllm() -> None:
    """Make vLLM look absent to the releases that look for names in it that it no longer has."""
    if find_trl().release < (0, 27):
        sys.modules["vllm"] = None  # type: ignore[assignment]


def supply_vllm_names() -> None:
    """Give an installed vLLM the names that the same releases look for, and 1.11 and 1.12."""
    if not importlib.util.find_spec("vllm"):
        return
    if find_trl().release < (0, 27):
        import vllm.sampling_params
        import vllm.transformers_utils

        vllm.sampling_params.GuidedDecodingParams = vllm.sampling_params.StructuredOutputsParams
        tokenizer = types.ModuleType("vllm.transformers_utils.tokenizer")
        vllm.transformers_utils.tokenizer = sys.modules[tokenizer.__name__] = tokenizer
    if (1, 11) <= find_trl().release < (1, 13):
        from vllm.distributed.weight_transfer import nccl_engine

        vars(nccl_engine).setdefault("NCCLTrainerSendWeightsArgs", None)


def import_package_table() -> None:
    """Import what TRL asks transformers about installed packages while that answers as before 5.3, with a bool.

    TRL below 0.29 takes `(False, None)`, the answer of today, for true.
    """
    if find_trl().release >= (0, 29):
        return
    from transformers.utils import import_utils

    tell = import_utils._is_package_available

    def told(name: str, return_version: bool = False) -> Any:
        found = tell(name, return_version=return_version)
        return found[0] if isinstance(found, tuple) and not return_version else found

    with mock.patch.object(import_utils, "_is_package_available", told):
        importlib.import_module("trl.import_utils")


def supply_warnings_issued(model: Any) -> None:
    """Give a model the attribute that TRL up to 0.27.1 writes to and transformers 5.1 no longer has."""
    if not hasattr(model, "warnings_issued"):
        model.warnings_issued = {}
