"""One line per engine, for `trlpatch.status()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.memory.kv_sleep import asleep
from trlpatch.engine.state import EngineState, known_engines


def describe_engines() -> list[str]:
    """The live engines that trlpatch has met: whose weights they compute with, how adapters reach them, how they
    sleep.
    """
    return [describe(engine, state) for engine, state in known_engines()]


def describe(engine: Any, state: EngineState) -> str:
    """One engine in one line."""
    name = Path(str(getattr(probes.model_config(engine), "model", None) or "engine")).name
    parts = [
        f"{name}, {'attached' if state.attached else 'built by TRL'}",
        f"weights {_weights(state)}",
        f"adapter {_adapter(engine, state)}",
        f"sleep: {_sleep(engine, state)}",
    ]
    sleeping = asleep(engine, state)
    parts.append(f"asleep now: {', '.join(sorted(sleeping))}" if sleeping else "awake")
    return "; ".join(parts)


def _weights(state: EngineState) -> str:
    if state.shared_weights:
        return "shared with the trainer"
    return "separate" + (f" ({state.why_separate})" if state.why_separate else "")


def _adapter(engine: Any, state: EngineState) -> str:
    if not probes.lora_enabled(engine):
        return "none (built without enable_lora=True)"
    if state.handover is None:
        return "not handed over yet"
    return str(getattr(state.handover, "description", type(state.handover).__name__))


def _sleep(engine: Any, state: EngineState) -> str:
    if not probes.sleep_enabled(engine):
        return "none (built without enable_sleep_mode=True)"
    return state.sleep_method or "has not slept yet"
