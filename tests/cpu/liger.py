"""Train with Liger's GRPO loss on an attached engine.

    python -m tests.cpu.liger OUT.json

In a process of its own; the TRL release is the one that can be imported.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import sys
from pathlib import Path
from typing import Any

from tests.cpu.small_grpo import small_grpo
from tests.cpu.training import Recorder
from trlpatch.source.locate import find_trl

# transformers would put Liger's own layers into the model as well, and those need a GPU.
NO_LAYERS = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)


def main(out: Path) -> None:
    import trlpatch

    trlpatch.PatchFastRL("grpo")
    checkpoint = tiny.checkpoint(out.parent / "model")
    engine = tiny.engine(checkpoint)
    policy = trlpatch.attach_engine(tiny.policy(checkpoint), engine)
    config = {"use_liger_kernel": True, "liger_kernel_config": NO_LAYERS}
    if find_trl().release < (0, 25):  # 0.25 made the loss a part of transformers' own option
        config = {"use_liger_loss": True}
    trainer = small_grpo(policy, out.parent, config=config)
    recorder = Recorder(trainer, engine)
    losses = count_losses(trainer)
    trainer.train()
    recorder.close()
    out.write_text(json.dumps({"rollouts": recorder.rollouts, "losses": losses}, indent=1))


def count_losses(trainer: Any) -> list[float]:
    """From now on note every loss that Liger computes."""
    found: list[float] = []
    name = "liger_grpo_loss" if hasattr(trainer, "liger_grpo_loss") else "liger_loss"
    own = getattr(trainer, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        loss, metrics = own(*arguments, **named)
        found.append(float(loss.detach()))
        return loss, metrics

    setattr(trainer, name, noted)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
