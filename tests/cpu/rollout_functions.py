"""Train with a `rollout_func`, one way of calling the engine after the other, on one attached engine.

    python -m tests.cpu.rollout_functions OUT.json

In a process of its own; the TRL release is the one that can be imported.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cpu.small_grpo import adapter_of, gap, small_grpo
from tests.cpu.training import MAX_COMPLETION, count_engines, engine_of, logged
from trlpatch.engine.state import state_of

Roll = Callable[[list[str], Any, Any], list[Any]]


def main(out: Path) -> None:
    import trlpatch

    trlpatch.PatchFastRL("grpo")
    checkpoint = tiny.checkpoint(out.parent / "model")
    engine = tiny.engine(checkpoint)
    built = count_engines()
    report: dict[str, Any] = {}
    ways = {**WAYS, **({"openenv": openenv} if _has_openenv() else {})}
    for name, roll in ways.items():
        policy = trlpatch.attach_engine(tiny.policy(checkpoint), engine)
        function = Function(roll, engine)
        trainer = small_grpo(policy, out.parent, rollout_func=function)
        if name in ("unpatched", "unguarded"):
            trainer.rollout_func = function
        if name == "unguarded":
            state_of(engine).bare_request = None
        trainer.train()
        report[name] = {
            "rollouts": function.rollouts,
            "seen": function.seen,
            "witness": logged(trainer, "sampling/sampling_logp_difference/max"),
        }
    report["engines_built"] = len(built)
    out.write_text(json.dumps(report, indent=1))


class Function:
    """A `rollout_func` that generates in one way and notes what came out of it."""

    def __init__(self, roll: Roll, engine: Any) -> None:
        self.rollouts: list[dict[str, Any]] = []
        self.seen = 0
        self._roll = roll
        self._engine = engine

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        outputs = self._roll(prompts, trainer, engine_of(trainer))
        self.seen += len(prompts)
        self.rollouts.append(
            {
                "step": trainer.state.global_step,
                "adapters": sorted({str(adapter_of(output)) for output in outputs}),
                "gap": max(gap(trainer.model, output) for output in outputs),
            }
        )
        return {
            "prompt_ids": [output.prompt_token_ids for output in outputs],
            "completion_ids": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [tiny.engine_logprobs(output).tolist() for output in outputs],
        }


def params() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=MAX_COMPLETION, temperature=1.0, logprobs=0)


def generate(prompts: list[str], trainer: Any, engine: Any) -> list[Any]:
    """What works in stock TRL: the engine has the policy in it."""
    return list(engine.generate(prompts, params(), use_tqdm=False))


def chat(prompts: list[str], trainer: Any, engine: Any) -> list[Any]:
    """The same with messages."""
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return list(engine.chat(messages, params(), use_tqdm=False))


def by_hand(prompts: list[str], trainer: Any, engine: Any) -> list[Any]:
    """The same one level below `LLM`."""
    for number, prompt in enumerate(prompts):
        engine.llm_engine.add_request(f"by-hand-{trainer.state.global_step}-{number}", prompt, params())
    done = []
    while engine.llm_engine.has_unfinished_requests():
        done += [output for output in engine.llm_engine.step() if output.finished]
    return sorted(done, key=lambda output: int(output.request_id.split("-")[3]))


def explicit(prompts: list[str], trainer: Any, engine: Any) -> list[Any]:
    """The same with the live adapter named."""
    import trlpatch

    request = trlpatch.lora_request(trainer.model)
    return list(engine.generate(prompts, params(), lora_request=request, use_tqdm=False))


def base(prompts: list[str], trainer: Any, engine: Any) -> list[Any]:
    """The base model, asked for in so many words."""
    model = trainer.model.get_base_model()
    return list(model.fast_generate(prompts, params(), lora_request=None, use_tqdm=False))


def openenv(prompts: list[str], trainer: Any, engine: Any) -> list[Any]:
    """TRL's own helper; what it asked the engine for is kept on the way."""
    from trl.experimental.openenv import generate_rollout_completions

    kept: list[Any] = []
    own = engine.generate

    def keep(*arguments: Any, **named: Any) -> Any:
        kept.extend(own(*arguments, **named))
        return kept

    engine.generate = keep
    try:
        found = generate_rollout_completions(trainer, prompts)
    finally:
        engine.generate = own
    assert [list(one["completion_ids"]) for one in found] == [list(output.outputs[0].token_ids) for output in kept]
    return kept


def _has_openenv() -> bool:
    return importlib.util.find_spec("trl.experimental.openenv") is not None


WAYS: dict[str, Roll] = {
    "generate": generate,
    "chat": chat,
    "by_hand": by_hand,
    "explicit": explicit,
    "base": base,
    "unpatched": generate,
    "unguarded": generate,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
