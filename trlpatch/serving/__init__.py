"""Serving: start the server that fits what was exported, wait until it answers, end it cleanly.

    with trlpatch.serving.serve("out/checkpoint-10") as server:
        OpenAI(base_url=server.url, api_key="-").completions.create(model=server.model, prompt="...")

Needs neither an engine in this process nor TRL; torch is imported by the comparison alone, in a process of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trlpatch.serving.comparison import Comparison
    from trlpatch.serving.health import Startup
    from trlpatch.serving.server import Server, serve

__all__ = ["Comparison", "Server", "Startup", "serve"]

_HOMES = {"Comparison": "comparison", "Startup": "health", "Server": "server", "serve": "server"}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
