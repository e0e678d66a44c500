"""Engine state: where one engine came from, how it is reached, and whose weights it holds."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trlpatch.engine.backend import RolloutBackend, backend_of, forget_backend
from trlpatch.engine.memory.headroom import HeadroomMonitor
from trlpatch.engine.occupancy import Occupancy
from trlpatch.engine.protocols import LoraRequest, RolloutEngine

if TYPE_CHECKING:
    from trlpatch.engine.adapter_sync.protocol import AdapterSync
    from trlpatch.engine.weights_in_place.writer import WeightsWriter
    from trlpatch.policy.adapter import PeftLayers
    from trlpatch.policy.base_weights import Weight
    from trlpatch.policy.content_mark import ContentMark

PolicyLocation = Literal["checkpoint", "adapter", "policy", "weights"]
"""Where the policy is inside the engine: nowhere yet (the weights it was built from), in the adapter that was
handed over, or in the base weights: "policy" by TRL's own full-weight sync (for a PEFT model the merged ones), of
which nothing is known, "weights" by `weights_in_place`, which can be asked whether they are current.
"""


class Removable(Protocol):
    """Something put on an engine's objects that can be taken off again."""

    def remove(self) -> None:
        """Take it off."""


@dataclass(frozen=True)
class Published:
    """One adapter version inside the engine."""

    request: LoraRequest
    fingerprint: tuple[object, ...] | None
    """What the adapter was; None where the way of adapter sync compares by itself. Of a sharded one, the part here."""
    model: weakref.ref[object]


@dataclass(frozen=True)
class WrittenPolicy:
    """The weights that were written into the engine's parameters."""

    mark: ContentMark
    model: weakref.ref[object]
    """The base model that they were of."""


@dataclass(frozen=True)
class BaseVerdict:
    """What was found when the engine's base weights were compared with a model's."""

    mark: tuple[object, ...]
    """What the model's were then (`base_mark` and `beside_mark`): the verdict holds until they are others."""
    reason: str | None
    """Why the engine's are not those, or None when they are."""


@dataclass
class EngineState:
    """What has happened to one engine through attach_engine and the hooks."""

    backend: RolloutBackend
    """How its workers are reached, wherever they are."""
    spans_ranks: bool | None = None
    """Do several processes drive it alike, each with a worker of its own? None until it was asked."""
    attached: bool = False
    """The user (not TRL) built it: its base weights are never discarded by a level-2 sleep."""
    shared_weights: bool = False
    """Its weights are a trainer's own storage (those of `sharers`): unmapping them would crash the trainer."""
    sharers: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Base models whose parameters are this engine's memory."""
    attached_to: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Base models that `attach_engine` has given it to."""
    compared: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Base models whose log-probabilities were compared with its own when it was attached, or were not to be."""
    why_separate: str | None = None
    """Why sharing was tried and given up, for `trlpatch.status()`; None when it was not tried."""
    sleep_method: str = ""
    """How it was put to sleep last, or why it stays awake, in words; empty before the first time."""
    headroom: HeadroomMonitor = field(default_factory=HeadroomMonitor)
    """What training leaves free on the device, measured from a sleep to the wake after it."""
    live_request: Callable[[], LoraRequest | None] | None = None
    """Gives the LoRARequest for a request that names none, while a trainer's `rollout_func` runs; else None."""
    bare_request: Callable[[RolloutEngine], LoraRequest | None] | None = None
    """Gives the LoRARequest for a request that names none, if a trainer has asked for it; set by the first trainer
    that takes the engine, None before.
    """
    occupancy: Occupancy = field(default_factory=Occupancy)
    """Who works with it now."""
    guards: Removable | None = None
    """Its guarded methods, see `trlpatch.engine.guards`."""
    weights_lost: bool = False
    """A level-2 sleep discarded the weights, and nothing has pushed them since."""
    torn: bool = False
    """Its weights are being written in place, or an interrupt left them half-written: no request may be answered."""
    weights_writer: WeightsWriter | None = None
    """Writes policies into its weights; made when that is tried first."""
    written: WrittenPolicy | None = None
    """What was written in place last; None when it is gone."""
    syncing: bool = False
    """The owner's own sync is running on our behalf."""
    policy_location: PolicyLocation = "checkpoint"
    published: Published | None = None
    adapter_sync: AdapterSync | None = None
    """The way that adapters reach it, chosen at the first hand-over."""
    base_verdict: weakref.WeakKeyDictionary[PeftLayers, BaseVerdict] = field(default_factory=weakref.WeakKeyDictionary)
    """PEFT layers as they were found -> what was found of the engine's base weights and those under them.

    Not by base model: an adapter that is merged and unloaded leaves the same model with other weights.
    """
    weights_attached: weakref.WeakKeyDictionary[object, dict[str, Weight]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    """Base model -> its weights when the engine was attached to it, unless they are the engine's own."""
    weights_pushed: tuple[weakref.ref[object], dict[str, Weight]] | None = None
    """The base model whose weights TRL has pushed last, and what they were; None when an adapter was merged into them.
    """
    disk_adapters: dict[str, int] = field(default_factory=dict)
    """Contents of a saved adapter -> number, for `model.load_lora(directory)`."""
    disk_files: dict[int, tuple[list[Path], str]] = field(default_factory=dict)
    """Number of a request for a directory -> files that vLLM reads when it is used first, and their digest."""
    disk_contents: dict[tuple[object, ...], str] = field(default_factory=dict)
    """Identity, size and times of its files -> digest of their contents."""
    private_directory: Path | None = None
    """For saved adapters that vLLM cannot read as they are."""
    _as_asked: threading.local = field(default_factory=threading.local)

    @contextmanager
    def supplying(self, live_request: Callable[[], LoraRequest | None]) -> Iterator[None]:
        """For the time of a `with`: requests without an adapter get what `live_request` gives, in every thread."""
        before, self.live_request = self.live_request, live_request
        try:
            yield
        finally:
            self.live_request = before

    @contextmanager
    def as_asked(self) -> Iterator[None]:
        """For the time of a `with`: a request of this thread without an adapter is one to the base model."""
        before, self._as_asked.on = self.on_purpose, True
        try:
            yield
        finally:
            self._as_asked.on = before

    @property
    def on_purpose(self) -> bool:
        """Does this thread know what it asks for?"""
        return getattr(self._as_asked, "on", False)

    def policy_pushed(self) -> None:
        """TRL's own full-weight sync follows: the base weights are the policy from now on."""
        self.policy_location = "policy"
        self.weights_lost = self.torn = False
        self.weights_pushed = None
        self.published = None
        self.written = None


_states: weakref.WeakKeyDictionary[RolloutEngine, EngineState] = weakref.WeakKeyDictionary()


def state_of(engine: RolloutEngine) -> EngineState:
    """The one state of this engine; a new one is awake, not attached, with its checkpoint's weights."""
    state = _states.get(engine)
    if state is None:
        state = _states[engine] = EngineState(backend_of(engine))
    return state


def known_engines() -> list[tuple[RolloutEngine, EngineState]]:
    """The engines of this process that are alive and that a hook or attach_engine has met, oldest first."""
    return list(_states.items())


def forget(engine: RolloutEngine) -> None:
    """Drop what is known about the engine (it was detached) and give it its own methods back.

    Adapters it holds are left where they are.
    """
    state = _states.pop(engine, None)
    forget_backend(engine)
    if state is not None and state.guards is not None:
        state.guards.remove()
