"""What `trlpatch.ray.async_grpo` relies on in TRL's AsyncGRPOTrainer, in the text of every release that has it."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from trlpatch.ray.async_grpo.merging import _CALLERS
from trlpatch.ray.async_grpo.samples import _GIVEN, _NEEDED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CALLS = {
    "rollout_worker.start", "rollout_worker.stop", "rollout_worker.update_model_version",
    "rollout_worker.check_health", "weight_transfer.init_weight_transfer", "weight_transfer.pause",
    "weight_transfer.send_weights", "weight_transfer.resume", "weight_transfer.destroy",
}  # fmt: skip
"""What the trainer asks of the two."""


def release_of(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.fixture(name="files")
def _files(version: str, trl_tree: Callable[[str], Path]) -> Path | None:
    """Where the trainer is; None for a release that is refused, whose worker sends the weights itself."""
    folder = trl_tree(version) / "trl" / "experimental" / "async_grpo"
    known = (folder / "weight_transfer.py").is_file()
    assert known == (release_of(version) >= (1, 6))
    return folder if known else None


def fields_of(text: str, name: str) -> dict[str, str]:
    """The annotated fields of a class, with their annotations."""
    (found,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef) and node.name == name]
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_a_sample_has_only_fields_that_can_be_given(version: str, files: Path | None) -> None:
    if files is None:
        return
    fields = fields_of((files / "async_rollout_worker.py").read_text(encoding="utf-8"), "RolloutSample")
    assert fields.keys() <= _GIVEN
    assert fields.keys() >= _NEEDED
    assert ("group_id" in fields) == (release_of(version) >= (1, 9))
    assert ("enqueued_at" in fields) == (release_of(version) >= (1, 11))
    arrays = {name for name, annotation in fields.items() if "ndarray" in annotation}
    expected = {"input_ids", "completion_mask", "old_log_probs"} if release_of(version) >= (1, 16) else set()
    assert arrays == expected


def test_the_trainer_asks_what_worker_and_transfer_have(version: str, files: Path | None) -> None:
    if files is None:
        return
    from trlpatch.ray.async_grpo.transfer import RayWeightTransfer
    from trlpatch.ray.async_grpo.worker import RayRolloutWorker

    text = (files / "async_grpo_trainer.py").read_text(encoding="utf-8")
    asked = {
        f"{node.value.attr}.{node.attr}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr in ("rollout_worker", "weight_transfer")
    }
    queues = {"rollout_worker.rollout_buffer"} | (
        {"rollout_worker.metrics_queue"} if release_of(version) >= (1, 11) else set()
    )
    # What is behind `isinstance(…, AsyncRolloutWorker)`.
    assert asked - {"rollout_worker._loop_kwargs"} == CALLS | queues
    for call in CALLS:
        owner, _, method = call.partition(".")
        assert callable(getattr(RayRolloutWorker if owner == "rollout_worker" else RayWeightTransfer, method))


def test_an_adapter_is_merged_where_it_is_left_unmerged(version: str, files: Path | None) -> None:
    if files is None:
        return
    tree = ast.parse((files / "async_grpo_trainer.py").read_text(encoding="utf-8"))
    merging = {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in ("merge_adapter", "unmerge_adapter")
    }
    assert merging <= set(_CALLERS)
    assert bool(merging) == (release_of(version) >= (1, 14))
