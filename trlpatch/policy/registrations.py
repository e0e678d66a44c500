"""How often a submodule was registered anywhere in this process: the signal that a cached walk over a model is old."""

from __future__ import annotations

from typing import Any


class _Registrations:
    def __init__(self) -> None:
        self._count = 0
        self._watching = False

    def count(self) -> int:
        """Registrations since the first call.

        Assigning a module to an attribute, `add_module` and `ModuleDict`/`ModuleList` items all pass torch's global
        hook (torch 2.0 and newer). Deleting does not: who caches a path has to look whether it still leads there.
        """
        if not self._watching:
            from torch.nn.modules.module import register_module_module_registration_hook

            register_module_module_registration_hook(self._registered)
            self._watching = True
        return self._count

    def _registered(self, parent: Any, name: str, child: Any) -> None:
        self._count += 1


registrations = _Registrations()
