"""Train on two engines on Ray actors, one case after the other, and report what happened.

    python -m tests.ray.grpo_runs OUT.json [CASE ...]

In a process of its own; the TRL release is the one that can be imported.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINES = 2
MAX_SEQS = 8
CLUSTER = {"num_cpus": 4, "object_store_memory": 200 * 2**20, "include_dashboard": False, "log_to_driver": False}
ATTEMPTS = 5
"""A busy machine gives Ray's agent too little time to start: ray.init fails then."""

# Actors that start at niceness 15 starve on a busy machine; a local cluster needs no token.
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass
class Rig:
    """What all cases share: starting Ray and an engine takes longer than all that they do."""

    directory: Path
    checkpoint: Path
    engines: Any

    def policy(self) -> Any:
        """Give a fresh adapter to a fresh model and attach the engines."""
        import trlpatch

        return trlpatch.attach_engine(tiny.policy(self.checkpoint), self.engines)


def main(out: Path, chosen: list[str]) -> None:
    import trlpatch
    import trlpatch.ray

    trlpatch.PatchFastRL()
    directory = out.parent
    checkpoint = tiny.checkpoint(directory / "model")
    report: dict[str, Any] = {}
    # Ray's sockets have paths of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as place:
        start_ray({**CLUSTER, "_temp_dir": place})
        try:
            began = time.monotonic()
            engines = create(checkpoint)
            report["init_seconds"] = time.monotonic() - began
            rig = Rig(directory, checkpoint, engines)
            for name in chosen or CASES:
                began = time.monotonic()
                report[name] = CASES[name](rig)
                report[f"{name}_seconds"] = time.monotonic() - began
        finally:
            trlpatch.ray.shutdown()
            import ray

            ray.shutdown()
    out.write_text(json.dumps(report, indent=1))


def start_ray(options: dict[str, Any]) -> None:
    """`ray.init`, again where it failed."""
    import ray

    for attempt in range(ATTEMPTS):
        try:
            ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            print(f"ray.init failed the {attempt + 1}. time: {error}", file=sys.stderr)
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(2.0 * (attempt + 1))


def create(checkpoint: Path, number: int = ENGINES, **changes: Any) -> Any:
    """Engines of the size that `tiny.engine` has."""
    import trlpatch.ray

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_lora_rank": 16,
        "max_model_len": 256,
        "max_num_seqs": MAX_SEQS,
    }
    return trlpatch.ray.create_engines(checkpoint, number, **{**settings, **changes})


def grpo(rig: Rig) -> dict[str, Any]:
    """Three steps of stock GRPO; then a control whose adapter is never sent."""
    from tests.cpu.small_grpo import small_grpo
    from tests.cpu.training import Recorder, engine_of, logged

    policy = rig.policy()
    trainer = small_grpo(policy, rig.directory)
    recorder = Recorder(trainer, rig.engines)
    spread = Spread(rig.engines)
    trainer.train()
    recorder.close()
    spread.close()
    return {
        "uses_them": engine_of(trainer) is rig.engines,
        "mode": (trainer.args.use_vllm, getattr(trainer.args, "vllm_mode", None)),
        "rollouts": recorder.rollouts,
        "witness": logged(trainer, "sampling/sampling_logp_difference/max"),
        "rewards": logged(trainer, "reward"),
        "sent": rig.engines.adapter_version,
        "engines": sorted(spread.engines),
        "control": control(rig),
    }


def control(rig: Rig) -> list[dict[str, Any]]:
    """As `grpo`, with the request left out of every rollout."""
    import trlpatch.hooks
    from tests.cpu.small_grpo import small_grpo
    from tests.cpu.training import Recorder
    from trlpatch.engine.state import state_of

    injected = trlpatch.hooks.lora_request
    trlpatch.hooks.lora_request = lambda *_: None
    try:
        trainer = small_grpo(rig.policy(), rig.directory)
        state_of(rig.engines).bare_request = None
        recorder = Recorder(trainer, rig.engines)
        trainer.train()
        recorder.close()
        return recorder.rollouts
    finally:
        trlpatch.hooks.lora_request = injected


class Spread:
    """Notes which engine answered."""

    def __init__(self, engines: Any) -> None:
        self.engines: set[int] = set()
        self._submit = engines.submit
        self._of = engines
        engines.submit = self._noted

    def _noted(self, index: int, request: Any) -> Any:
        self.engines.add(index)
        return self._submit(index, request)

    def close(self) -> None:
        """Note no more."""
        del self._of.submit


CASES: dict[str, Callable[[Rig], Any]] = {"grpo": grpo}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
