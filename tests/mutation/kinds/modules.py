"""N: modules that are new, moved, split or gone: mutants of the whole tree."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator

from tests.mutation.hosts import Host, host, indented, read, rollout_hosts, tree_of
from tests.mutation.mutants import Change, kind

TRAINER = "trl/trainer/grpo_trainer.py"
NEW = "trl/experimental/newpo/newpo_trainer.py"


def tree(release: str) -> Iterator[Host]:
    """Yield the GRPO trainer, which stands for the release."""
    yield host(release, TRAINER, "GRPOTrainer")


def survivor(make: Callable[[Host], Change]) -> Callable[[Host], Change]:
    kind("N", tree, former_survivor=True)(make)  # type: ignore[arg-type]
    return make


def _engine(on: Host) -> str:
    return (
        "self.vllm_generation.llm"
        if (tree_of(on.release) / "trl/generation/vllm_generation.py").is_file()
        else "self.llm"
    )


def _new(code: str, path: str = NEW) -> dict[str, str | None]:
    files: dict[str, str | None] = {path: textwrap.dedent(code).lstrip()}
    if "/experimental/" in path or path.count("/") > 2:
        files[path.rpartition("/")[0] + "/__init__.py"] = ""
    return files


def _subclass(on: Host, body: str, imports: str = "", path: str = NEW) -> dict[str, str | None]:
    head = f"from trl.trainer.grpo_trainer import GRPOTrainer\n{imports}\n\n\nclass NewPOTrainer(GRPOTrainer):\n"
    return _new(head + indented(body.format(engine=_engine(on)), 4), path)


@survivor
def new_trainer_rolls_out(on: Host) -> Change:
    """A new experimental subclass samples on the trainer's engine (as DPPO did in 1.0)."""
    return _subclass(on, "def _generate_single_turn(self, prompts):\n    return {engine}.generate(prompts)")


@survivor
def new_trainer_rolls_out_through_an_alias(on: Host) -> Change:
    """The same, through a local name."""
    return _subclass(
        on, "def _generate_single_turn(self, prompts):\n    engine = {engine}\n    return engine.chat(prompts)"
    )


@survivor
def new_trainer_builds_an_engine(on: Host) -> Change:
    """A new trainer builds an engine of its own."""
    return _new("""
        from vllm import LLM
        from transformers import Trainer


        class NewPOTrainer(Trainer):
            def __init__(self, model, args):
                self.llm = LLM(model=model.name_or_path)

            def roll(self, prompts):
                return self.llm.generate(prompts)
    """)


@survivor
def new_trainer_in_the_stable_folder(on: Host) -> Change:
    """The same beside the stable trainers."""
    body = "def _generate_single_turn(self, prompts):\n    return {engine}.generate(prompts)"
    return _subclass(on, body, path="trl/trainer/newpo_trainer.py")


@survivor
def new_trainer_asynchronous(on: Host) -> Change:
    """A new asynchronous trainer (trl.experimental.async_grpo)."""
    return _subclass(on, "async def roll(self, prompts):\n    return {engine}.generate(prompts)")


@survivor
def new_trainer_with_a_sync(on: Host) -> Change:
    """A new subclass pushes weights in its own way."""
    model = "{engine}.llm_engine.model_executor.driver_worker.model_runner.model"
    return _subclass(on, f"def sync_weights(self):\n    {model}.load_weights(self.model.state_dict().items())")


@survivor
def new_trainer_sleeps(on: Host) -> Change:
    """A new subclass puts the engine to sleep."""
    return _subclass(
        on, "def training_step(self, *args):\n    {engine}.sleep(level=2)\n    return super().training_step(*args)"
    )


@survivor
def new_callback(on: Host) -> Change:
    """A new callback samples for logging."""
    engine = _engine(on).partition(".")[2]
    return _new(
        f"""
        from transformers import TrainerCallback


        class SampleCallback(TrainerCallback):
            def __init__(self, trainer):
                self.trainer = trainer

            def on_log(self, args, state, control, **kwargs):
                return self.trainer.{engine}.generate(["a prompt"])
    """,
        "trl/trainer/sampling_callbacks.py",
    )


@survivor
def new_helper(on: Host) -> Change:
    """A new helper for environments takes the trainer (as openenv did in 0.26)."""
    engine = _engine(on).partition(".")[2]
    return _new(
        f"""
        def generate_for_environment(trainer, prompts):
            return trainer.{engine}.generate(prompts)
    """,
        "trl/experimental/environments/rollouts.py",
    )


@survivor
def new_engine_module(on: Host) -> Change:
    """A new generation backend beside VLLMGeneration."""
    return _new(
        """
        from vllm import LLM


        class ColocatedGeneration:
            def __init__(self, model):
                self.model = model
                self.llm = LLM(model=model.name_or_path)

            def sync_weights(self):
                model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
                model.load_weights(self.model.state_dict().items())

            def generate(self, prompts):
                return self.llm.generate(prompts)
    """,
        "trl/generation/colocated.py" if "vllm_generation" in _engine(on) else "trl/extras/colocated.py",
    )


@survivor
def new_mixin_module(on: Host) -> Change:
    """A mixin in a module of its own, and the trainer inherits it."""
    mixin = f"""
        class RolloutMixin:
            def roll(self, prompts):
                return {_engine(on)}.generate(prompts)
    """
    text = on.with_import("from trl.trainer.rollout_mixin import RolloutMixin").replace(
        "class GRPOTrainer(", "class GRPOTrainer(RolloutMixin, ", 1
    )
    return {**_new(mixin, "trl/trainer/rollout_mixin.py"), TRAINER: text}


@survivor
def existing_callbacks_roll_out(on: Host) -> Change:
    """A callback that is there (trl/trainer/callbacks.py) goes over to the engine."""
    path = "trl/trainer/callbacks.py"
    if not (tree_of(on.release) / path).is_file():
        return None
    engine = _engine(on).partition(".")[2]
    added = f"def _generate_on_engine(trainer, prompts):\n    return trainer.{engine}.generate(prompts)\n"
    return {path: f"{read(on.release, path).rstrip()}\n\n\n{added}"}


@survivor
def existing_utils_roll_out(on: Host) -> Change:
    """A function of trl/trainer/utils.py takes the engine's owner."""
    path = "trl/trainer/utils.py"
    added = "def generate_on(owner, prompts):\n    return owner.llm.generate(prompts)\n"
    return {path: f"{read(on.release, path).rstrip()}\n\n\n{added}"}


@survivor
def replay_buffer_rolls_out(on: Host) -> Change:
    """An experimental trainer that is there (GRPO with a replay buffer) rolls out by itself."""
    folder = tree_of(on.release) / "trl/experimental"
    paths = sorted(folder.glob("*/*_trainer.py")) if folder.is_dir() else []
    known = {h.path for h in rollout_hosts(on.release)}
    for path in (p.relative_to(tree_of(on.release)).as_posix() for p in paths):
        text = read(on.release, path)
        if "(GRPOTrainer):" in text and path not in known:
            added = f"    def _second_rollout(self, prompts):\n        return {_engine(on)}.generate(prompts)\n"
            return {path: f"{text.rstrip()}\n\n{added}"}
    return None


@kind("N", rollout_hosts)
def moved_into_a_package(on: Host) -> Change:
    """The file moves into a package of its own."""
    moved = on.path.replace(".py", "/core.py")
    return {on.path: None, moved: on.text}


@kind("N", rollout_hosts)
def moved_between_stable_and_experimental(on: Host) -> Change:
    """The file leaves experimental/, or goes there (OnlineDPO in 0.26, Distillation in 1.10)."""
    name = on.path.rpartition("/")[2]
    moved = f"trl/trainer/moved_{name}" if "experimental" in on.path else f"trl/experimental/moved/{name}"
    return {on.path: None, moved: on.text}


@kind("N", rollout_hosts)
def moved_behind_a_shim(on: Host) -> Change:
    """The file moves, and a shim with its name imports from it (0.26 to 0.28)."""
    moved = on.path.replace(".py", "_core.py")
    shim = f"from .{moved.rpartition('/')[2].removesuffix('.py')} import *\n"
    return {on.path: shim, moved: on.text}


@kind("N", rollout_hosts)
def gone(on: Host) -> Change:
    """The file is gone (SSD in 1.16)."""
    return {on.path: None}


@kind("N", rollout_hosts)
def class_moved_to_another_file(on: Host) -> Change:
    """The class moves to a file of its own, and is imported from there."""
    if on.class_node is None:
        return None
    moved = on.path.replace(".py", "_class.py")
    start, end = on.lines(on.class_node)
    import_it = f"from .{moved.rpartition('/')[2].removesuffix('.py')} import {on.cls}\n"
    return {on.path: on.edit(((start, end), import_it)), moved: on.text}


@kind("N", rollout_hosts)
def class_renamed_with_an_alias(on: Host) -> str | None:
    """The class gets another name, and the old one is an alias."""
    if on.class_node is None:
        return None
    return on.text.replace(f"class {on.cls}(", f"class New{on.cls}(", 1).replace(
        f"class {on.cls}:", f"class New{on.cls}:", 1
    ) + (f"\n\n{on.cls} = New{on.cls}\n")
