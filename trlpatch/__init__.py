"""Stock TRL trainers that roll out on an in-process vLLM engine with the live LoRA adapter.

    from trlpatch import FastLanguageModel, PatchFastRL

    PatchFastRL()

    from trl import GRPOTrainer

Importing trlpatch imports nothing else; names are resolved when they are used.
"""

from __future__ import annotations

from trlpatch import errors

TYPE_CHECKING = False  # typing.TYPE_CHECKING without importing typing
if TYPE_CHECKING:
    from typing import Any

    from trlpatch.engine.attach import attach_engine, detach_engine
    from trlpatch.engine.sampling_params import vLLMSamplingParams
    from trlpatch.hooks.lora_request import live_lora_request as lora_request
    from trlpatch.loading.model import FastLanguageModel, FastModel, FastVisionModel, is_bfloat16_supported
    from trlpatch.loading.model import is_bfloat16_supported as is_bf16_supported
    from trlpatch.runtime.children import child_environment
    from trlpatch.runtime.report import PatchReport
    from trlpatch.runtime.session import PatchFastRL, patch, status, unpatch

    __version__: str

__all__ = [
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "PatchFastRL",
    "PatchReport",
    "__version__",
    "attach_engine",
    "child_environment",
    "detach_engine",
    "errors",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "lora_request",
    "patch",
    "status",
    "unpatch",
    "vLLMSamplingParams",
]

_HOMES = {
    "FastLanguageModel": ("trlpatch.loading.model", "FastLanguageModel"),
    "FastModel": ("trlpatch.loading.model", "FastModel"),
    "FastVisionModel": ("trlpatch.loading.model", "FastVisionModel"),
    "PatchFastRL": ("trlpatch.runtime.session", "PatchFastRL"),
    "PatchReport": ("trlpatch.runtime.report", "PatchReport"),
    "attach_engine": ("trlpatch.engine.attach", "attach_engine"),
    "child_environment": ("trlpatch.runtime.children", "child_environment"),
    "detach_engine": ("trlpatch.engine.attach", "detach_engine"),
    "is_bf16_supported": ("trlpatch.loading.model", "is_bfloat16_supported"),
    "is_bfloat16_supported": ("trlpatch.loading.model", "is_bfloat16_supported"),
    "lora_request": ("trlpatch.hooks.lora_request", "live_lora_request"),
    "patch": ("trlpatch.runtime.session", "patch"),
    "status": ("trlpatch.runtime.session", "status"),
    "unpatch": ("trlpatch.runtime.session", "unpatch"),
    "vLLMSamplingParams": ("trlpatch.engine.sampling_params", "vLLMSamplingParams"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        from importlib import import_module

        module, attribute = _HOMES[name]
        value = getattr(import_module(module), attribute)
    else:
        import sys

        from trlpatch.elsewhere import refusal

        # Of an AttributeError `from trlpatch import` shows no word but "cannot import name". importlib's
        # `_handle_fromlist` asks with hasattr() before that, and lets any other exception pass.
        raise refusal(name, importing=sys._getframe(1).f_code.co_name == "_handle_fromlist")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("trlpatch")
    except PackageNotFoundError:
        return "0+unknown"  # run from a source tree that is not installed
