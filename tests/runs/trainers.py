"""The trainers that roll out on vLLM: where a TRL release keeps them, and what each must be given to train."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trlpatch.source.locate import find_trl

PROMPTS = [
    f"{who} {what} {where}"
    for who in ("the cat", "a dog", "one bird", "no fish")
    for what in ("sat on", "ran to")
    for where in ("the mat", "a park")
]

REPEATS = 4
"""The trainers that take prompts one by one drop what does not fill a batch."""

GROUP = 8
"""Completions per prompt, for the trainers that compare them."""


@dataclass(frozen=True)
class Algorithm:
    """What is particular to one trainer.

    Attributes:
        name: as `PatchFastRL` takes it.
        trainer, config: class names.
        data: the columns of its dataset.
        rewarded: it takes `reward_funcs`.
        maximizes: its mean reward rises; SDPO only chooses by it what it distills.
        taught: it takes a `teacher_model`.
        settings: fields of its config beside those that all have.
        given: further arguments of the trainer.
    """

    name: str
    trainer: str
    config: str
    data: Callable[[], dict[str, list[Any]]]
    rewarded: bool = False
    maximizes: bool = False
    taught: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    given: tuple[tuple[str, Any], ...] = ()

    def classes(self) -> tuple[Any, Any]:
        """Import the trainer and its config from where the installed release has them."""
        for module in (f"trl.experimental.{self.name}", "trl"):
            try:
                home = importlib.import_module(module)
                return getattr(home, self.trainer), getattr(home, self.config)
            except (ModuleNotFoundError, AttributeError) as error:
                absent = (module, "trl.experimental")
                if module == "trl" or (isinstance(error, ModuleNotFoundError) and error.name not in absent):
                    raise
        raise AssertionError("unreachable")

    def dataset(self) -> Any:
        from datasets import Dataset

        columns = self.data()
        return Dataset.from_dict({name: values * REPEATS for name, values in columns.items()})


def keep_first(group_completions: Any, group_rewards: Any, **_: Any) -> list[list[float]]:
    """GFPO's filter, of every group's completions: keep what comes first."""
    return [[-float(index) for index, _ in enumerate(group)] for group in group_completions]


def _prompts() -> dict[str, list[Any]]:
    return {"prompt": list(PROMPTS)}


def _privileged() -> dict[str, list[Any]]:
    return {"prompt": list(PROMPTS), "privileged_context": ["in the sun"] * len(PROMPTS)}


def _messages() -> dict[str, list[Any]]:
    turn = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": " and the sun shone"}] for text in PROMPTS
    ]
    return {"messages": turn}


def _distillation() -> dict[str, list[Any]]:
    return _messages() if find_trl().release < (1, 10) else _prompts()


_GROUPED = (("num_generations", GROUP),)
_ON_POLICY = (("lmbda", 1.0), ("top_p", 1.0), ("beta", 1.0), ("num_generations", 1))

ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("grpo", "GRPOTrainer", "GRPOConfig", _prompts, rewarded=True, maximizes=True, settings=_GROUPED),
        Algorithm("rloo", "RLOOTrainer", "RLOOConfig", _prompts, rewarded=True, maximizes=True, settings=_GROUPED),
        Algorithm(
            "online_dpo",
            "OnlineDPOTrainer",
            "OnlineDPOConfig",
            _prompts,
            rewarded=True,
            maximizes=True,
            settings=(("beta", 0.1), ("num_generations", 2)),
        ),
        Algorithm(
            "gfpo",
            "GFPOTrainer",
            "GFPOConfig",
            _prompts,
            rewarded=True,
            maximizes=True,
            settings=(*_GROUPED, ("num_remains_in_group", GROUP // 2)),
            given=(("group_filter_func", keep_first),),
        ),
        Algorithm("dppo", "DPPOTrainer", "DPPOConfig", _prompts, rewarded=True, maximizes=True, settings=_GROUPED),
        Algorithm("gold", "GOLDTrainer", "GOLDConfig", _messages, taught=True, settings=_ON_POLICY),
        Algorithm(
            "distillation",
            "DistillationTrainer",
            "DistillationConfig",
            _distillation,
            taught=True,
            settings=_ON_POLICY,
        ),
        Algorithm("iw_opd", "IWOPDTrainer", "IWOPDConfig", _messages, taught=True, settings=_ON_POLICY),
        Algorithm(
            "sdpo",
            "SDPOTrainer",
            "SDPOConfig",
            _privileged,
            rewarded=True,
            settings=(*_GROUPED, ("include_environment_feedback", True), ("success_reward_threshold", 0.5)),
        ),
        Algorithm("sdft", "SDFTTrainer", "SDFTConfig", _privileged, settings=_GROUPED),
        Algorithm("ssd", "SSDTrainer", "SSDConfig", _prompts),
    )
}
