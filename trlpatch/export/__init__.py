"""Export: merged weights, adapters and GGUF files, of a model in training, a checkpoint or an adapter directory.

    from trlpatch.export import save_pretrained_merged

Models of FastLanguageModel have these functions as methods.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from trlpatch.export.api import push_to_hub_gguf, push_to_hub_merged, save_pretrained_gguf, save_pretrained_merged

__all__ = ["push_to_hub_gguf", "push_to_hub_merged", "save_pretrained_gguf", "save_pretrained_merged"]


def __getattr__(name: str) -> Any:
    # The child processes of GGUF import this package for its parts.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("trlpatch.export.api"), name)
