"""Watch module registrations: one below a module that a cached walk over a model has visited makes the walk old."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable


class Watch:
    """The modules of one walk; `moved` once one of them has got another child."""

    def __init__(self, members: Iterable[object]) -> None:
        self.moved = False
        self._members: weakref.WeakSet[object] = weakref.WeakSet(members)

    def registered(self, parent: object) -> None:
        """Take note of a registration, wherever it was.

        Whoever is no member yet has to be put under one first to be part of the model, which is a registration itself.
        """
        if not self.moved and parent in self._members:
            self.moved = True


class _Registrations:
    def __init__(self) -> None:
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._lock = threading.RLock()  # a garbage collection inside may build modules, too
        self._hooked = False

    def watch(self, members: Iterable[object]) -> Watch:
        """Watch these modules from now on, as long as the watch is kept.

        Assigning a module to an attribute, `add_module` and `ModuleDict`/`ModuleList` items all pass torch's global
        hook (torch 2.0 and newer). Deleting does not: who caches a path has to look whether it still leads there.
        Registrations elsewhere say nothing: a slice of a `ModuleList`, which transformers takes of its layers in every
        forward pass, is a new container that the modules are registered in.
        """
        if not self._hooked:
            from torch.nn.modules.module import register_module_module_registration_hook

            register_module_module_registration_hook(self._registered)
            self._hooked = True
        watch = Watch(members)
        with self._lock:
            self._watches.add(watch)
        return watch

    def _registered(self, parent: object, name: str, child: object) -> None:
        with self._lock:  # modules may be built in any thread, and a set that grows cannot be walked
            watches = tuple(self._watches)
        for watch in watches:
            watch.registered(parent)


registrations = _Registrations()
