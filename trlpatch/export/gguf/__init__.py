"""GGUF: llama.cpp's converter, quantized rows, and the check that runs the file."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from trlpatch.export.gguf.adapter import export_adapter_gguf
    from trlpatch.export.gguf.export import export_gguf

__all__ = ["export_adapter_gguf", "export_gguf"]


def __getattr__(name: str) -> Any:
    # Child processes import this package for its parts, and need neither of these.
    from importlib import import_module

    homes = {"export_adapter_gguf": "trlpatch.export.gguf.adapter", "export_gguf": "trlpatch.export.gguf.export"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)
