"""Train from a model id and a `peft_config`: TRL loads the model, makes the adapter and builds the engine.

    python -m tests.cpu.model_ids OUT.json

In a process of its own; the TRL release is the one that can be imported.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.cpu.small_grpo import adapter_of, gap, small_grpo
from tests.cpu.training import count_engines, engine_of
from trlpatch.source.locate import find_trl


def main(out: Path) -> None:
    from peft import LoraConfig

    import trlpatch

    trlpatch.PatchFastRL("grpo")
    built = count_engines()
    checkpoint = tiny.checkpoint(out.parent / "model")
    length = {"vllm_max_model_length": 128} if find_trl().release >= (0, 26) else {"max_prompt_length": 64}
    if find_trl().release < (0, 20):  # these leave it to a launcher
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ.update({**rank, **os.environ})
    trainer = small_grpo(
        str(checkpoint),
        out.parent,
        config={"use_vllm": True, "vllm_mode": "colocate", "max_steps": 4, **length},
        peft_config=LoraConfig(**tiny.lora_settings()),
    )
    rollouts = Rollouts(trainer)
    trainer.train()
    report = {"rollouts": rollouts.found, "built_with": built, "model": type(trainer.model).__name__}
    out.write_text(json.dumps(report, indent=1))


class Rollouts:
    """Scores what the engine generates with the training model, and with its base model."""

    def __init__(self, trainer: Any) -> None:
        self.found: list[dict[str, Any]] = []
        self._trainer = trainer
        self._engine = engine_of(trainer)
        self._generate = self._engine.generate
        self._engine.generate = self

    def __call__(self, prompts: Any, sampling_params: Any, **named: Any) -> Any:
        sampling_params.logprobs = 0  # below 0.23 TRL does not ask; asking changes nothing that is sampled
        outputs = self._generate(prompts, sampling_params=sampling_params, **named)
        model = self._trainer.model
        found = {"adapter": adapter_of(outputs[0]), "gap": max(gap(model, output) for output in outputs)}
        with model.disable_adapter():
            found["of_base"] = max(gap(model, output) for output in outputs)
        self.found.append(found)
        return outputs


if __name__ == "__main__":
    main(Path(sys.argv[1]))
