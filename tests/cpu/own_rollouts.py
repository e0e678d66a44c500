"""Train with code that asks the trainer's engine by itself, without an adapter, and interrupt a training.

    python -m tests.cpu.own_rollouts OUT.json

In a process of its own; the TRL release is the one that can be imported.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cpu.rollout_functions import by_hand, chat, generate
from tests.cpu.small_grpo import adapter_of, gap, small_grpo
from tests.cpu.training import engine_of


def main(out: Path) -> None:
    import trlpatch

    trlpatch.PatchFastRL("grpo")
    checkpoint = tiny.checkpoint(out.parent / "model")
    engine = tiny.engine(checkpoint)
    said = Said()
    logging.getLogger("trlpatch").addHandler(said)
    report: dict[str, Any] = {}
    for name, way in WAYS.items():
        said.lines.clear()
        policy = trlpatch.attach_engine(tiny.policy(checkpoint), engine)
        tiny.move(policy, seed=1)
        report[name] = {"calls": Run(policy, out.parent, way).calls, "said": list(said.lines)}
    said.lines.clear()
    policy = trlpatch.attach_engine(tiny.policy(checkpoint), engine)
    report["interrupted"] = {**interrupted(policy, engine, out.parent), "said": list(said.lines)}
    out.write_text(json.dumps(report, indent=1))


class Said(logging.Handler):
    """The warnings of trlpatch."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Run:
    """Three steps, after each of which, in a callback, the engine is asked in one way."""

    def __init__(self, policy: Any, directory: Path, way: Callable[..., list[Any]]) -> None:
        from transformers import TrainerCallback

        self.calls: list[dict[str, Any]] = []
        trainer = small_grpo(policy, directory)

        class Asks(TrainerCallback):  # type: ignore[misc]
            def on_step_end(_, *args: Any, **kwargs: Any) -> None:  # noqa: N805
                outputs = way(tiny.prompts(3), trainer, engine_of(trainer))
                self.calls.append(
                    {
                        "adapters": sorted({str(adapter_of(output)) for output in outputs}),
                        "gap": max(gap(trainer.model, output) for output in outputs),
                    }
                )

        trainer.add_callback(Asks())
        trainer.train()


def in_a_thread(prompts: list[str], trainer: Any, engine: Any) -> list[Any]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(generate(prompts, trainer, engine)))
    thread.start()
    thread.join()
    return found


def base(prompts: list[str], trainer: Any, engine: Any) -> list[Any]:
    with trainer.model.disable_adapter():
        return generate(prompts, trainer, engine)


WAYS = {"generate": generate, "chat": chat, "by_hand": by_hand, "in_a_thread": in_a_thread, "base": base}


def interrupted(policy: Any, engine: Any, directory: Path) -> dict[str, Any]:
    """A training that stops in the middle of a rollout, then what comes after it."""
    step, count = engine.llm_engine.step, 0

    def interrupting() -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return step()

    engine.llm_engine.step = interrupting
    try:
        small_grpo(policy, directory).train()
        raise AssertionError("not interrupted")
    except KeyboardInterrupt:
        pass
    finally:
        engine.llm_engine.step = step
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=4, logprobs=0, temperature=1.0)
    outputs = policy.fast_generate(["the dog ran"], params, use_tqdm=False)
    prompts, difference = [output.prompt for output in outputs], max(gap(policy, output) for output in outputs)
    trainer = small_grpo(policy, directory)
    trainer.train()
    return {
        "prompts": prompts,
        "gap": difference,
        "steps": trainer.state.global_step,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
