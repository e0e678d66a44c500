"""Train on two ranks, each with an engine of its own.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.cpu.ranks CASE CHECKPOINT OUT

Every rank writes OUT/rank<i>.json. The TRL release is the one that can be imported. A rank that is not done after
SECONDS writes the stacks of its threads to stderr and ends with status 1, and torchrun ends the other one.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import faulthandler
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from tests.cpu.small_grpo import small_grpo
from tests.cpu.training import Recorder, count_engines, engine_of

CASES = ("attached", "launcher", "late", "own")
SECONDS = 300


def main(case: str, checkpoint: Path, out: Path) -> None:
    import trlpatch

    rank = int(os.environ["RANK"])
    trlpatch.PatchFastRL("grpo")
    built = count_engines()
    policy = tiny.policy(checkpoint)
    if case != "late":
        join()
    if case != "own":
        launcher = {"distributed_executor_backend": "external_launcher"} if case == "launcher" else {}
        trlpatch.attach_engine(policy, tiny.engine(checkpoint, **launcher))
    settings = {"vllm_mode": "colocate", "use_vllm": True, "vllm_max_model_length": 128, "max_prompt_length": 64}
    directory = out / f"files{rank}"
    trainer = small_grpo(policy, directory, config=settings if case == "own" else None)
    recorder = Recorder(trainer, engine_of(trainer))
    trainer.train()
    recorder.close()
    found: dict[str, Any] = {
        "ranks": trainer.accelerator.num_processes,
        "engines_built": len(built),
        "rollouts": recorder.rollouts,
        "weights": digest(policy),
    }
    (out / f"rank{rank}.json").write_text(json.dumps(found, indent=1))


def join() -> None:
    """Meet the other ranks; a trainer's config does the same, if it is built before the engine."""
    from accelerate import PartialState

    PartialState(cpu=True)


def digest(model: Any) -> str:
    """A hash of all adapter weights, to the last bit; with sharded ones every rank calls it."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found.update(whole.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def end() -> NoReturn:
    """End this process without destructors."""
    # torch has no safe way to end a process that has a gloo group. Its destructor joins threads that may wait for the
    # GIL, which it holds (https://github.com/pytorch/pytorch/issues/56297); left to the interpreter's end, the same
    # threads may abort it (https://github.com/pytorch/pytorch/issues/190489).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    end()
