from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.loading.test_platform_checks import CONFIG
from trlpatch.errors import ConflictingArguments, EngineBuildFailed
from trlpatch.loading import ranks


class PartialStateStub:
    """accelerate's, of a rank of a process group that somebody has made."""

    _shared_state: ClassVar[dict[str, Any]] = {}
    world, rank = 2, 1
    asked_with: ClassVar[tuple[Any, ...]] = ()

    def __init__(self, **asked: Any) -> None:
        type(self).asked_with = tuple(asked.items())
        self.num_processes, self.process_index = self.world, self.rank


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Rank 1 of two, on GPUs."""
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(PartialState=PartialStateStub))  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(PartialStateStub, "world", 2)
    monkeypatch.setattr(PartialStateStub, "asked_with", ())
    return monkeypatch


def test_each_rank_has_an_engine_and_a_seed_of_its_own(launched: pytest.MonkeyPatch) -> None:
    found = ranks.meet_other_ranks(dataclasses.replace(CONFIG, random_state=7))
    assert found.engine == {"enforce_eager": True, "distributed_executor_backend": "external_launcher", "seed": 8}
    assert PartialStateStub.asked_with == (("cpu", False),)
    assert ranks.meet_other_ranks(dataclasses.replace(CONFIG, engine={"seed": 3})).engine["seed"] == 4
    own = dataclasses.replace(CONFIG, engine={"distributed_executor_backend": "ray"})
    assert ranks.meet_other_ranks(own).engine["distributed_executor_backend"] == "ray"


def test_ranks_of_one_engine_sample_alike(launched: pytest.MonkeyPatch) -> None:
    assert ranks.meet_other_ranks(dataclasses.replace(CONFIG, engine={"tensor_parallel_size": 2})).engine["seed"] == 0
    with pytest.raises(ConflictingArguments, match=r"tensor_parallel_size=3: a launcher started 2 ranks"):
        ranks.meet_other_ranks(dataclasses.replace(CONFIG, engine={"tensor_parallel_size": 3}))


def test_nothing_changes_for_one_process_and_without_an_engine(launched: pytest.MonkeyPatch) -> None:
    without = dataclasses.replace(CONFIG, fast_inference=False)
    assert ranks.meet_other_ranks(without) is without
    launched.setenv("WORLD_SIZE", "1")
    assert ranks.meet_other_ranks(CONFIG) is CONFIG
    launched.delenv("WORLD_SIZE")
    assert ranks.meet_other_ranks(CONFIG) is CONFIG
    assert PartialStateStub.asked_with == ()


def test_a_process_group_of_other_ranks_is_refused(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(PartialStateStub, "world", 1)
    with pytest.raises(EngineBuildFailed, match=r"a launcher started 2 ranks .*process group has 1; expected RANK"):
        ranks.meet_other_ranks(CONFIG)


def test_weights_that_a_launcher_shards_are_not_shared(launched: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ranks.meet_other_ranks(CONFIG).why_separate is None
    launched.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    launched.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert ranks.meet_other_ranks(CONFIG).why_separate is None
    launched.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert "ZeRO-3" in str(ranks.meet_other_ranks(CONFIG).why_separate)
    settings = tmp_path / "zero.json"
    launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(settings))
    settings.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert ranks.meet_other_ranks(CONFIG).why_separate is None
    settings.write_text("{}")
    assert "ZeRO-3" in str(ranks.meet_other_ranks(CONFIG).why_separate), "unknown: as if it did"
    launched.setenv("ACCELERATE_USE_FSDP", "True")
    assert "FSDP" in str(ranks.meet_other_ranks(CONFIG).why_separate)
    with pytest.raises(ConflictingArguments, match=r"share_weights=True, but FSDP"):
        ranks.meet_other_ranks(dataclasses.replace(CONFIG, share_weights=True))


def test_ranks_on_a_cpu_share_weights_only_on_request(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
    assert "from cpu to cpu:0" in str(ranks.meet_other_ranks(CONFIG).why_separate)
    assert PartialStateStub.asked_with == (("cpu", True),)
    assert ranks.meet_other_ranks(dataclasses.replace(CONFIG, share_weights=True)).why_separate is None
