"""The callback that ties worker and transfer to AsyncGRPOTrainer: settings, the model, checkpoints, resume."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from trlpatch.errors import AsyncNotSupported
from trlpatch.log import logger
from trlpatch.ray.async_grpo.merging import leave_unmerged
from trlpatch.ray.async_grpo.prompts import Progress
from trlpatch.ray.async_grpo.settings import check_engines, longest, rollout_settings, warn_of_large_groups
from trlpatch.ray.async_grpo.transfer import RayWeightTransfer
from trlpatch.ray.async_grpo.worker import RayRolloutWorker

STATE_FILE = "trlpatch_rollouts.json"
"""In a checkpoint, beside trainer_state.json."""


class RolloutsCallback(TrainerCallback):  # type: ignore[misc]
    """Before TRL's own callbacks, which come after those of the user.

    From TRL 1.11 on the trainer writes `rollout_state.json` and reads it, for its own worker alone.
    """

    def __init__(
        self,
        worker: RayRolloutWorker | None,
        transfer: RayWeightTransfer | None,
        infos: Any = (),
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        """`worker` and `transfer` are None on ranks that have no engines."""
        self._worker = worker
        self._transfer = transfer
        self._infos = infos
        self._sampling = sampling
        self._trainer: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take from the trainer what the user has told it: its arguments and its tokenizer."""
        self._trainer = trainer = self._from_stack()
        # There is no data to skip on resume: TRL 1.11 and newer say so, before samples would be made and thrown away.
        args.ignore_data_skip = True
        if self._worker is None:
            return
        check_engines(self._infos, args)
        # Unset, TRL asks its vLLM server, which there is none of.
        if getattr(args, "token_budget", -1) is None:
            args.token_budget = longest(self._infos)
        settings = rollout_settings(args, self._sampling)
        warn_of_large_groups(settings, args)
        self._worker.configure(settings, trainer.processing_class)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where the checkpoint stands that training is resumed from, before anything is sent."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        adapter_alone = self._transfer is not None and self._transfer.follow(model)
        if trainer.accelerator.num_processes > 1:  # all ranks merge, and drift, or none
            from accelerate.utils import broadcast_object_list

            (adapter_alone,) = broadcast_object_list([adapter_alone])
        if self._transfer is None or self._worker is None:
            if adapter_alone:
                leave_unmerged(model)
            return
        # TRL 1.6 to 1.8 have no keyword for it.
        trainer.weight_transfer = self._transfer
        checkpoint = _local(_train_frame(trainer), "resume_from_checkpoint") if state.global_step else None
        if checkpoint is not None:
            self._resume(Path(checkpoint))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what has been trained on."""
        if self._worker is not None:
            self._worker.step_ended()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the position in the prompts and the version of the policy into the checkpoint."""
        if self._worker is None:
            return
        folder = Path(self._trainer._get_output_dir(trial=None)) / f"checkpoint-{state.global_step}"
        done = self._worker.trained.progress()
        text = json.dumps(
            {"position": done.position, "beyond": done.beyond, "model_version": self._trainer.model_version}
        )
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{STATE_FILE}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / STATE_FILE)

    def _resume(self, checkpoint: Path) -> None:
        assert self._worker is not None
        try:
            found = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            logger.warning(
                "%s has no %s: the run that wrote it had no Ray engines; prompts start at the first one",
                checkpoint, STATE_FILE,
            )  # fmt: skip
            return
        done = Progress(found["position"], tuple(found["beyond"]))
        self._worker.resume_from(done, found["model_version"])
        self._trainer.model_version = found["model_version"]
        # Of the prompts that `num_train_epochs` asks for, these are done. Before TRL 1.9 it becomes `max_steps`.
        if hasattr(self._trainer, "_groups_before_resume"):
            self._trainer._groups_before_resume = done.position + len(done.beyond)
        elif hasattr(self._trainer, "_trained_groups"):
            self._trainer._trained_groups.update(range(done.position), done.beyond)
        logger.info("rollouts go on at prompt %d with policy version %d", done.position, found["model_version"])

    def _from_stack(self) -> Any:
        """The trainer under construction: transformers tells a callback everything but that."""
        frame = _outward(sys._getframe(1), lambda self_: self in _callbacks(self_))
        if frame is None:
            raise AsyncNotSupported(
                "the callback of `trlpatch.ray.async_rollouts(...)` was told that a trainer is made, and finds none; "
                "expected `AsyncGRPOTrainer(model, **trlpatch.ray.async_rollouts(...))`"
            )
        return frame.f_locals["self"]


def _callbacks(trainer: Any) -> list[Any]:
    return (
        list(getattr(vars(trainer).get("callback_handler"), "callbacks", ())) if hasattr(trainer, "__dict__") else []
    )


def _outward(frame: FrameType | None, is_it: Callable[[Any], bool]) -> FrameType | None:
    while frame is not None:
        if "self" in frame.f_code.co_varnames[:1] and is_it(frame.f_locals.get("self")):
            return frame
        frame = frame.f_back
    return None


def _train_frame(trainer: Any) -> FrameType | None:
    """The frame of the trainer's method that has resolved `resume_from_checkpoint`: True is the last one."""
    frame = _outward(sys._getframe(1), lambda self_: self_ is trainer)
    while frame is not None and "resume_from_checkpoint" not in frame.f_locals:
        frame = _outward(frame.f_back, lambda self_: self_ is trainer)
    return frame


def _local(frame: FrameType | None, name: str) -> Any:
    return None if frame is None else frame.f_locals.get(name)
