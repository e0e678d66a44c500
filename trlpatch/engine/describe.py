"""Describe the live engines for `trlpatch.status()`, one line each."""

from __future__ import annotations

from pathlib import Path

from trlpatch.engine import probes
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.state import EngineState, known_engines


def describe_engines() -> list[str]:
    """The live engines that trlpatch has met: their weights, how adapters reach them, how they sleep."""
    return [describe(engine, state) for engine, state in known_engines()]


def describe(engine: RolloutEngine, state: EngineState) -> str:
    """One engine in one line."""
    parts = [
        f"{_name(engine)}, {'attached' if state.attached else 'built by TRL'}",
        *filter(None, [state.backend.location]),
        f"weights {_weights(state)}",
        f"adapter {_adapter(engine, state)}",
        f"sleep: {_sleep(engine, state)}",
    ]
    parts.append(_now(engine, state))
    return "; ".join(parts)


def _name(engine: RolloutEngine) -> str:
    """The last part of the model's path; its id where the path is a snapshot in the hub's cache."""
    path = Path(str(getattr(probes.model_config(engine), "model", None) or "engine"))
    repository = path.parent.parent.name  # huggingface_hub: models--ORG--NAME/snapshots/REVISION
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def _weights(state: EngineState) -> str:
    if state.shared_weights:
        return "shared with the trainer"
    if state.torn:
        return "half-written: no request is answered until they are written anew"
    writer = state.backend.weight_transfer() or state.weights_writer
    if state.policy_location == "weights" and writer is not None:
        return writer.description
    return "separate" + (f" ({state.why_separate})" if state.why_separate else "")


def _adapter(engine: RolloutEngine, state: EngineState) -> str:
    if state.policy_location == "weights":
        return "none (the policy is in the weights)"
    if not probes.lora_enabled(engine):
        return "none (built without enable_lora=True)"
    if state.adapter_sync is None:
        return "not handed over yet"
    return ", ".join(filter(None, [state.adapter_sync.description, state.backend.lora_layers()]))


def _sleep(engine: RolloutEngine, state: EngineState) -> str:
    if not probes.sleep_enabled(engine):
        return "none (built without enable_sleep_mode=True)"
    return state.sleep_method or "has not slept yet"


def _now(engine: RolloutEngine, state: EngineState) -> str:
    sleeping = state.backend.asleep()
    if not sleeping:
        return "awake"
    return f"asleep now: {', '.join(sorted(sleeping))}" if probes.sleep_enabled(engine) else probes.PAUSED
