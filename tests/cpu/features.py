"""What trainers can do besides a plain training, one short training after another on one attached engine.

    python -m tests.cpu.features OUT.json [ALGORITHM/SCENARIO ...]

In a process of its own; the TRL release is the one that can be imported. Every policy starts from an adapter that is
not zero, so that a rollout without its adapter is noticed from the first step on.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.cpu.training import Recorder, configured, count_engines, engine_of, logged, odd_tokens
from trlpatch.source.locate import find_trl

GENERATIONS = 4
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ALGORITHMS = {"grpo": ("GRPO", (0, 18)), "rloo": ("RLOO", (0, 22)), "online_dpo": ("OnlineDPO", (0, 18))}
"""Name in TRL's classes, and the release from which on it rolls out on vLLM."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("only", nargs="*")
    arguments = parser.parse_args()
    bench = Bench(arguments.out.parent / "features")
    known = [name for name, (_, first) in ALGORITHMS.items() if find_trl().release >= first]
    wanted = arguments.only or [f"{name}/{scenario}" for name in known for scenario in SCENARIOS[name]]
    report: dict[str, Any] = {"found": {}}
    for name in wanted:
        algorithm, scenario = name.split("/")
        report["found"].setdefault(algorithm, {})[scenario] = bench.run(algorithm, SCENARIOS[algorithm][scenario])
    report["engines_built"], report["launched"] = len(bench.built), sorted(bench.launched)
    report["patched"] = [importlib.import_module(type_.__module__).__file__ for type_ in bench.types]
    arguments.out.write_text(json.dumps(report, indent=1))


class Judge:
    """What OnlineDPO takes instead of reward functions below 0.23: the larger share of tokens with an odd id wins."""

    def judge(self, prompts: list[Any], completions: list[tuple[str, str]]) -> list[int]:
        words = tiny.tokenizer()
        shares = [odd_tokens([words(text)["input_ids"] for text in pair]) for pair in completions]
        return [int(first < second) for first, second in shares]


class Bench:
    """One engine, and trainers of any kind on it."""

    def __init__(self, directory: Path) -> None:
        import trlpatch

        trlpatch.PatchFastRL()
        self.directory = directory
        self.model = tiny.checkpoint(directory / "model")
        self.words = tiny.tokenizer()
        self.words.chat_template = TEMPLATE
        self.words.save_pretrained(self.model)  # for the engine
        self.engine = tiny.engine(self.model)
        self.built = count_engines()
        self.types: set[type] = set()
        self.launched: set[str] = set()
        self.algorithm = ""

    def run(self, algorithm: str, scenario: Callable[[Bench], dict[str, Any]]) -> dict[str, Any]:
        """What the scenario found, or its traceback as `error`; always the `seconds` that it took."""
        self.algorithm = algorithm
        start = time.monotonic()
        try:
            found = scenario(self)
        except Exception:
            found = {"error": traceback.format_exc()}
        return {**found, "seconds": round(time.monotonic() - start, 2)}

    def policy(self, *, seed: int = 1) -> Any:
        """A model with an adapter that is not zero, and the engine."""
        import trlpatch

        policy = tiny.policy(self.model)
        tiny.move(policy, seed=seed)
        return trlpatch.attach_engine(policy, self.engine)

    def base(self) -> Any:
        """A model without an adapter, and the engine."""
        from transformers import AutoModelForCausalLM

        import trlpatch

        return trlpatch.attach_engine(AutoModelForCausalLM.from_pretrained(self.model), self.engine)

    def trainer(self, model: Any, steps: int, *, given: dict[str, Any] | None = None, **changes: Any) -> Any:
        """A trainer of the current algorithm; `given` are its own arguments, `changes` those of its config."""
        import transformers

        cls, config = self._classes()
        settings: dict[str, Any] = {
            "output_dir": str(self.directory / "out"),
            "per_device_train_batch_size": 2 * GENERATIONS,
            "per_device_eval_batch_size": 2 * GENERATIONS,
            "num_generations": GENERATIONS,
            "max_completion_length": 16,
            "max_new_tokens": 16,
            "max_steps": steps,
            "beta": 0.1 if self.algorithm == "online_dpo" else 0.0,
            **changes,
        }
        arguments: dict[str, Any] = {
            "model": model,
            "args": configured(config, settings),
            "train_dataset": tiny.dataset(32),
            "processing_class": self.words,
            **({"judge": Judge()} if self._judged() else {"reward_funcs": odd_tokens}),
            **(given or {}),
        }
        made = cls(**{name: value for name, value in arguments.items() if value is not None})
        made.remove_callback(transformers.PrinterCallback)
        assert engine_of(made) is self.engine
        self.types.add(cls)
        self.launched.add(str(made.accelerator.distributed_type))
        return made

    def train(self, trainer: Any, **arguments: Any) -> dict[str, Any]:
        """Train; the rollouts, and how far the adapter went."""
        before = digest(trainer.model)
        with self.recorded(trainer) as rollouts:
            trainer.train(**arguments)
        return {"rollouts": rollouts, "moved": digest(trainer.model) != before}

    @contextlib.contextmanager
    def recorded(self, trainer: Any) -> Iterator[list[dict[str, Any]]]:
        recorder = Recorder(trainer, self.engine)
        try:
            yield recorder.rollouts
        finally:
            recorder.close()

    def prompts(self, rollouts: list[dict[str, Any]]) -> list[str]:
        """What was asked, as text: transformers 5 loads another class of tokenizer, with other tokens for numbers."""
        return sorted({self.words.decode(ids) for rollout in rollouts for ids in rollout["prompts"]})

    def _judged(self) -> bool:
        return self.algorithm == "online_dpo" and find_trl().release < (0, 23)

    def _classes(self) -> tuple[Any, Any]:
        name, _ = ALGORITHMS[self.algorithm]
        moved = self.algorithm == "online_dpo" and find_trl().release >= (0, 26)
        home = importlib.import_module("trl.experimental.online_dpo" if moved else "trl")
        return getattr(home, f"{name}Trainer"), getattr(home, f"{name}Config")


def digest(model: Any) -> str:
    """Of the trained adapter."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and ".default." in name:
            found.update(parameter.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def plain(bench: Bench) -> dict[str, Any]:
    return bench.train(bench.trainer(bench.policy(), 3))


def conversational(bench: Bench) -> dict[str, Any]:
    """Prompts that are messages."""
    data = tiny.dataset(32, conversational=True)
    found = bench.train(bench.trainer(bench.policy(), 3, given={"train_dataset": data}))
    render = functools.partial(bench.words.apply_chat_template, add_generation_prompt=True, tokenize=False)
    rendered = [render(messages) for messages in data["prompt"]]
    return {**found, "prompts": bench.prompts(found["rollouts"]), "rendered": rendered}


def without_requests(bench: Bench) -> dict[str, Any]:
    """The control: what the other scenarios would measure if rollouts did not carry the adapter."""
    import trlpatch.hooks
    from trlpatch.hooks import adopt_engine

    injected, guard = trlpatch.hooks.lora_request, adopt_engine.bare_request
    trlpatch.hooks.lora_request = lambda *_: None
    adopt_engine.bare_request = None  # type: ignore[assignment]  # else the guard supplies what the rollout lacks
    try:
        return conversational(bench)
    finally:
        trlpatch.hooks.lora_request, adopt_engine.bare_request = injected, guard


def evaluation(bench: Bench) -> dict[str, Any]:
    """After each step, at the end with the best adapter loaded again, and once more after a change by hand."""
    import transformers

    class FirstIsBest(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **_: Any) -> None:
            metrics["eval_worse"] = state.global_step

    every = {name: {f"{name}_strategy": "steps", f"{name}_steps": 1} for name in ("eval", "save")}
    trainer = bench.trainer(
        bench.policy(),
        3,
        given={"eval_dataset": tiny.dataset(4), "callbacks": [FirstIsBest()]},
        **every["eval"],
        **every["save"],
        load_best_model_at_end=True,
        metric_for_best_model="eval_worse",
        greater_is_better=False,
    )
    versions: list[str] = []
    trainer.add_callback(calling("on_step_end", lambda: versions.append(digest(trainer.model))))
    found = bench.train(trainer)
    best = digest(trainer.model) == versions[0] != versions[-1]
    with bench.recorded(trainer) as later:
        trainer.evaluate()
        tiny.move(trainer.model, seed=5)
        trainer.evaluate()
    return {**found, "best_loaded": best, "later": later, "eval_rewards": len(logged(trainer, "eval_reward"))}


def calling(event: str, note: Callable[[], None]) -> Any:
    """A callback that does nothing else."""
    import transformers

    callback = transformers.TrainerCallback()
    setattr(callback, event, lambda *_, **__: note())
    return callback


def accumulation(bench: Bench) -> dict[str, Any]:
    """Several micro-steps per step: in one rollout, in two, and one rollout for two steps."""
    size = {"per_device_train_batch_size": GENERATIONS, "gradient_accumulation_steps": 4}
    if bench.algorithm == "online_dpo":
        return {"each": bench.train(bench.trainer(bench.policy(), 2, **{**size, "gradient_accumulation_steps": 2}))}
    longer = {**size, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    return {
        "one": bench.train(bench.trainer(bench.policy(), 3, **size)),
        "two": bench.train(bench.trainer(bench.policy(), 2, **size, steps_per_generation=2)),
        "longer": bench.train(bench.trainer(bench.policy(), 4, **longer)),
    }


def iterations(bench: Bench) -> dict[str, Any]:
    """Two steps on each rollout."""
    return bench.train(bench.trainer(bench.policy(), 4, num_iterations=2))


def resumed(bench: Bench) -> dict[str, Any]:
    """Two steps, then two more by another trainer of another policy, from the checkpoint, on the same engine."""
    home = bench.directory / f"resumed-{bench.algorithm}"
    out = {"output_dir": str(home), "save_strategy": "steps", "save_steps": 2}
    first = bench.trainer(bench.policy(), 2, **out)
    before = bench.train(first)
    trainer = bench.trainer(bench.policy(seed=2), 4, **out)
    restored: list[str] = []
    trainer.add_callback(calling("on_train_begin", lambda: restored.append(digest(trainer.model))))
    after = bench.train(trainer, resume_from_checkpoint=str(home / "checkpoint-2"))
    return {
        "before": before,
        "after": after,
        "restored": restored == [digest(first.model)],
        "adapters": sorted(trainer.model.peft_config),
        "saved": sorted(path.name for path in home.iterdir()),
    }


def checkpointing(bench: Bench) -> dict[str, Any]:
    """Activations are computed again in the backward pass."""
    settings: dict[str, Any] = {"gradient_checkpointing": True}
    if bench.algorithm == "online_dpo" and find_trl().release < (0, 23):
        # These leave input gradients, which reentrant checkpointing needs, to the caller.
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    trainer = bench.trainer(bench.policy(), 3, **settings)
    backward, going, again = trainer.accelerator.backward, [], []

    def watched(*args: Any, **kwargs: Any) -> None:
        going.append(True)
        backward(*args, **kwargs)
        going.clear()

    trainer.accelerator.backward = watched
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.0.mlp"))
    # Before, not after: torch stops computing again as soon as it has what it needs, inside this module.
    layer.register_forward_pre_hook(lambda *_: again.append(True) if going else None)
    return {**bench.train(trainer), "computed_again": len(again)}


def reference(bench: Bench) -> dict[str, Any]:
    """A KL penalty: TRL compares with the adapter switched off or, in newer releases, with a second adapter."""
    trainer = bench.trainer(bench.policy(), 3, beta=0.1)
    return {**bench.train(trainer), "adapters": sorted(trainer.model.peft_config), "kl": logged(trainer, "kl")}


def no_processing_class(bench: Bench) -> dict[str, Any]:
    trainer = bench.trainer(bench.policy(), 2, given={"processing_class": None})
    found = bench.train(trainer)
    name = type(trainer.processing_class).__name__
    return {**found, "loaded": name, "prompts": bench.prompts(found["rollouts"]), "asked": list(tiny.prompts(32))}


def peft_config(bench: Bench) -> dict[str, Any]:
    """The trainer makes the adapter, on a model that carries the engine."""
    from peft import LoraConfig

    trainer = bench.trainer(bench.base(), 3, given={"peft_config": LoraConfig(**tiny.lora_settings())})
    return {**bench.train(trainer), "model": type(trainer.model).__name__}


def merged(bench: Bench) -> dict[str, Any]:
    """An adapter becomes part of the base weights, which the engine has without it; a new one is trained on top."""
    from peft import LoraConfig

    from trlpatch.errors import AdapterNotExpressible
    from trlpatch.options import Options
    from trlpatch.options import activate as set_options
    from trlpatch.options import active as options

    policy = bench.policy()
    bench.train(bench.trainer(policy, 1))
    given = {"peft_config": LoraConfig(**tiny.lora_settings())}
    trainer = bench.trainer(policy.merge_and_unload(), 1, given=given)
    before = options()
    # By default all weights would be written; what is looked at here is that the difference is noticed.
    set_options(Options(**{**vars(before), "adapter": "request"}))
    try:
        trainer.train()
    except AdapterNotExpressible as error:
        return {"refused": str(error)}
    finally:
        set_options(before)
    return {"refused": None}


_ALL = {
    "plain": plain,
    "conversational": conversational,
    "without_requests": without_requests,
    "accumulation": accumulation,
    "resumed": resumed,
    "checkpointing": checkpointing,
    "peft_config": peft_config,
    "merged": merged,
}
_GROUPED = {
    "evaluation": evaluation,
    "iterations": iterations,
    "reference": reference,
    "no_processing_class": no_processing_class,
}
SCENARIOS: dict[str, dict[str, Callable[[Bench], dict[str, Any]]]] = {
    "grpo": {**_ALL, **_GROUPED},
    "rloo": {**_ALL, **_GROUPED},
    "online_dpo": _ALL,
}


if __name__ == "__main__":
    main()
