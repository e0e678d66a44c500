"""What trlpatch knows about one engine: where it came from, what sleeps, and whose weights it holds."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trlpatch.engine.adapters import AdapterHandover

Holds = Literal["checkpoint", "adapter", "policy"]
"""Where the policy is inside the engine: nowhere yet (the weights it was built from), in the adapter that was
handed over, or in the base weights (TRL's own full-weight sync; for a PEFT model the merged ones).
"""


@dataclass(frozen=True)
class Published:
    """One adapter version inside the engine."""

    request: Any
    fingerprint: tuple[object, ...]
    model: weakref.ref[Any]


@dataclass
class EngineState:
    """What has happened to one engine through attach_engine and the hooks."""

    attached: bool = False
    """The user (not TRL) built it: its base weights are never discarded by a level-2 sleep."""
    shared_weights: bool = False
    """Its weights are the trainer's own storage: unmapping them would crash the trainer."""
    asleep: set[str] = field(default_factory=set)
    """Pools put to sleep through the hooks; the executor is asked first where it can be."""
    weights_lost: bool = False
    """A level-2 sleep discarded the weights, and nothing has pushed them since."""
    syncing: bool = False
    """The owner's own sync is running on our behalf."""
    holds: Holds = "checkpoint"
    published: Published | None = None
    handover: AdapterHandover | None = None
    base_verdict: weakref.WeakKeyDictionary[Any, str | None] = field(default_factory=weakref.WeakKeyDictionary)
    """Base model -> why the engine's base weights are not that model's, or None when they are."""

    disk_adapters: dict[str, int] = field(default_factory=dict)
    """Directory and time of saving -> number, for `model.load_lora(directory)`."""

    def policy_pushed(self) -> None:
        """TRL's own full-weight sync follows: the base weights are the policy from now on."""
        self.holds = "policy"
        self.weights_lost = False
        self.published = None


_states: weakref.WeakKeyDictionary[Any, EngineState] = weakref.WeakKeyDictionary()


def state_of(engine: Any) -> EngineState:
    """The one state of this engine; a new one is awake, not attached, with its checkpoint's weights."""
    state = _states.get(engine)
    if state is None:
        state = _states[engine] = EngineState()
    return state


def forget(engine: Any) -> None:
    """Drop what is known about the engine (it was detached). Adapters it holds are left where they are."""
    _states.pop(engine, None)
