"""What the next TRL release may change, as edits of real sources, and what trlpatch has to say of each."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BASE = "1.16.0"
NEXT = "1.16.99"
"""Stands for the release after `BASE`. Of its minor, so that a range closed at a later release still holds for it."""

TRAINERS = frozenset({"grpo", "rloo", "gold", "distillation", "sdpo", "sdft", "iw_opd"})
ON_VLLM_GENERATION = TRAINERS | {"vllm_generation"}


@dataclass(frozen=True)
class Trl:
    """A copy of the sources that may be edited."""

    root: Path

    def read(self, file: str) -> str:
        return (self.root / file).read_text(encoding="utf-8")

    def write(self, file: str, text: str) -> None:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def edit(self, file: str, old: str, new: str) -> None:
        text = self.read(file)
        assert old in text, f"{file} has no {old!r} any more: correct the case"
        self.write(file, text.replace(old, new))

    def everywhere(self, old: str, new: str) -> None:
        files = [file.relative_to(self.root).as_posix() for file in self.root.rglob("*.py")]
        changed = [file for file in files if old in self.read(file)]
        assert changed, f"no file has {old!r} any more: correct the case"
        for file in changed:
            self.edit(file, old, new)

    def move(self, old: str, new: str) -> None:
        self.write(new, self.read(old))
        (self.root / old).unlink()

    def remove(self, folder: str) -> None:
        shutil.rmtree(self.root / folder)


@dataclass(frozen=True)
class Case:
    """One change and what is said of it.

    Attributes:
        failed: for each target that does not fit, what the message says of it.
        stock: the targets that stay stock for it, besides their configs; None means those of `failed`.
        gone: targets that are not in this TRL, which is no failure.
        refused: algorithms that cannot be asked for, and what the message says.
        modules: files without a target that use an engine, and what the message says; they hold no target back.
        untaught: what the verdict says before a new trainer that rolls out through VLLMGeneration; empty without one.
    """

    change: Callable[[Trl], None]
    failed: dict[str, str] = field(default_factory=dict)
    stock: frozenset[str] | None = None
    gone: frozenset[str] = frozenset()
    refused: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    untaught: str = ""


def removed_algorithm(trl: Trl) -> None:
    trl.remove("experimental/iw_opd")


def experimental_becomes_stable(trl: Trl) -> None:
    for part in ("trainer", "config"):
        trl.move(f"experimental/online_dpo/online_dpo_{part}.py", f"trainer/online_dpo_{part}.py")
    trl.remove("experimental/online_dpo")


def moved_with_a_shim(trl: Trl) -> None:
    trl.move("experimental/gold/gold_trainer.py", "trainer/gold_trainer.py")
    trl.write("experimental/gold/gold_trainer.py", "from ...trainer.gold_trainer import GOLDTrainer\n")


def package_instead_of_module(trl: Trl) -> None:
    trl.move("trainer/grpo_trainer.py", "trainer/grpo_trainer/trainer.py")
    trl.write("trainer/grpo_trainer/__init__.py", "from .trainer import GRPOTrainer\n")


def moved_engine(trl: Trl) -> None:
    trl.move("generation/vllm_generation.py", "generation/vllm/engine.py")
    trl.everywhere("generation.vllm_generation import", "generation.vllm.engine import")


def split_engine(trl: Trl) -> None:
    text = trl.read("generation/vllm_generation.py")
    at = text.index("    def generate(\n")
    trl.write("generation/vllm_rollouts.py", "class VLLMRollouts:\n" + text[at:])
    head = text[:at].replace("class VLLMGeneration:", "class VLLMGeneration(VLLMRollouts):")
    trl.write("generation/vllm_generation.py", head.rstrip() + "\n")


def renamed_class(trl: Trl) -> None:
    trl.everywhere("VLLMGeneration", "VLLMEngine")


def renamed_method(trl: Trl) -> None:
    trl.everywhere("sync_weights", "push_weights")


def second_rollout(trl: Trl) -> None:
    call = "all_outputs = self.llm.generate(vllm_prompts, sampling_params=sampling_params, use_tqdm=False)"
    indent = " " * 16
    trl.edit("generation/vllm_generation.py", call, f"{call}\n{indent}again = self.llm.generate(vllm_prompts)")


def new_config_field(trl: Trl) -> None:
    new = '    vllm_kv_dtype: str = field(default="auto", metadata={"help": "dtype of the KV cache"})\n'
    trl.edit("trainer/grpo_config.py", "    use_vllm: bool = field(", f"{new}    use_vllm: bool = field(")


def renamed_config_field(trl: Trl) -> None:
    trl.everywhere("use_vllm", "rollout_on_vllm")


def reformatted(trl: Trl) -> None:
    for file in [*trl.root.glob("trainer/*.py"), *trl.root.glob("generation/*.py"), *trl.root.rglob("*_trainer.py")]:
        file.write_text(ast.unparse(ast.parse(file.read_text(encoding="utf-8"))) + "\n", encoding="utf-8")


NEW_TRAINER = """\
from ...generation.vllm_generation import VLLMGeneration
from ...trainer.base_trainer import _BaseTrainer


class NewPOTrainer(_BaseTrainer):
    def __init__(self, model, args):
        self.vllm_generation = VLLMGeneration(model=model)

    def _generate(self, prompts):
        return self.vllm_generation.llm.generate(prompts)
"""

NEW_ENGINE = """\
from vllm import LLM

from ...trainer.base_trainer import _BaseTrainer


class NewPOTrainer(_BaseTrainer):
    def __init__(self, model, args):
        self.llm = LLM(model=model.name_or_path)

    def _generate(self, prompts):
        return self.llm.generate(prompts)
"""


def new_trainer_past_vllm_generation(trl: Trl) -> None:
    trl.write("experimental/newpo/newpo_trainer.py", NEW_TRAINER)


def new_trainer_on_vllm_generation(trl: Trl) -> None:
    through = NEW_TRAINER.replace(".llm.generate", ".generate")
    trl.write("experimental/newpo/newpo_trainer.py", through)


def new_trainer_on_a_stock_generation(trl: Trl) -> None:
    new_trainer_on_vllm_generation(trl)
    second_rollout(trl)


def new_trainer_with_an_engine(trl: Trl) -> None:
    trl.write("experimental/newpo/newpo_trainer.py", NEW_ENGINE)


def everything_removed(trl: Trl) -> None:
    trl.remove("trainer")
    trl.remove("experimental")
    trl.write("trainer/__init__.py", "")


_KNOWN_AT = "; trlpatch knows it at trl/"
_ONLINE_DPO = f"OnlineDPOTrainer is now in trl/trainer/online_dpo_trainer.py{_KNOWN_AT}experimental/online_dpo/"
_IN_PACKAGE = f"GRPOTrainer is now in trl/trainer/grpo_trainer/trainer.py{_KNOWN_AT}trainer/grpo_trainer.py"

_NEWPO = "trl/experimental/newpo/newpo_trainer.py"

CASES = {
    "removed_algorithm": Case(
        removed_algorithm,
        gone=frozenset({"iw_opd", "iw_opd_config"}),
        refused={"iw_opd": f"no file of TRL {NEXT} defines IWOPDTrainer"},
    ),
    "experimental_becomes_stable": Case(
        experimental_becomes_stable,
        failed={
            "online_dpo": _ONLINE_DPO,
            "online_dpo_config": "OnlineDPOConfig is now in trl/trainer/online_dpo_config.py",
        },
        refused={"online_dpo": _ONLINE_DPO},
        modules={"trl/trainer/online_dpo_trainer.py": "without the LoRA"},
    ),
    "moved_with_a_shim": Case(
        moved_with_a_shim,
        failed={"gold": "GOLDTrainer is now in trl/trainer/gold_trainer.py"},
        stock=ON_VLLM_GENERATION,
    ),
    "package_instead_of_module": Case(
        package_instead_of_module,
        failed={"grpo": _IN_PACKAGE},
        stock=ON_VLLM_GENERATION,
        refused={"grpo": _IN_PACKAGE},
    ),
    "moved_engine": Case(
        moved_engine,
        failed={"vllm_generation": "VLLMGeneration is now in trl/generation/vllm/engine.py"},
        stock=ON_VLLM_GENERATION,
        modules={"trl/generation/vllm/engine.py": "without the LoRA"},
    ),
    "split_engine": Case(
        split_engine,
        failed={"vllm_generation": "rollout_call: expected 1, found 0"},
        stock=ON_VLLM_GENERATION,
        modules={"trl/generation/vllm_rollouts.py": "without the LoRA"},
    ),
    "renamed_class": Case(
        renamed_class,
        failed={
            **dict.fromkeys(TRAINERS, "expected 1, found 0"),
            "vllm_generation": f"no file of TRL {NEXT} defines VLLMGeneration",
        },
    ),
    "renamed_method": Case(
        renamed_method,
        failed={
            **dict.fromkeys(TRAINERS, "self.vllm_generation.push_weights"),
            "vllm_generation": "sync_method: expected 1, found 0",
        },
    ),
    "second_rollout": Case(
        second_rollout, failed={"vllm_generation": "rollout_call: expected 1, found 2"}, stock=ON_VLLM_GENERATION
    ),
    "new_config_field": Case(new_config_field),
    "renamed_config_field": Case(
        renamed_config_field,
        failed={
            **dict.fromkeys(TRAINERS | {"online_dpo"}, "no longer reads `args.use_vllm`"),
            **{f"{name}_config": "no field `use_vllm`" for name in TRAINERS | {"online_dpo"}},
        },
        stock=ON_VLLM_GENERATION | {"online_dpo"},
    ),
    "reformatted": Case(reformatted),
    "new_trainer_past_vllm_generation": Case(new_trainer_past_vllm_generation, modules={_NEWPO: "without the LoRA"}),
    "new_trainer_on_vllm_generation": Case(
        new_trainer_on_vllm_generation, untaught="no target, rolls out through VLLMGeneration, which is patched: "
    ),
    "new_trainer_on_a_stock_generation": Case(
        new_trainer_on_a_stock_generation,
        failed={"vllm_generation": "rollout_call: expected 1, found 2"},
        stock=ON_VLLM_GENERATION,
        untaught="no target, rolls out through VLLMGeneration, which stays stock: ",
    ),
    "new_trainer_with_an_engine": Case(new_trainer_with_an_engine, modules={_NEWPO: "an engine is built"}),
    "everything_removed": Case(
        everything_removed,
        failed=dict.fromkeys(TRAINERS | {"online_dpo"}, f"no file of TRL {NEXT} defines "),
        stock=ON_VLLM_GENERATION | {"online_dpo"},
        gone=frozenset(f"{name}_config" for name in TRAINERS | {"online_dpo"}),
        refused={"grpo": f"no file of TRL {NEXT} defines GRPOTrainer"},
    ),
}
