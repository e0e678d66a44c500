"""compat="on" and "off" with the configs, trainers and tokenizers of the TRL release that can be imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import processes

pytestmark = [pytest.mark.cpu, pytest.mark.release]


@pytest.fixture(scope="module", params=["early", "late"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/cpu/compat_runs.py found, with TRL imported before `PatchFastRL` and after it."""
    out = tmp_path_factory.mktemp("compat") / "found.json"
    done = processes.run_module("tests.cpu.compat_runs", [str(out), request.param], timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(Path(out).read_text(encoding="utf-8"))
    return result


def test_every_config_warms_up_over_the_ratio(found: dict[str, Any]) -> None:
    assert found["warmup"].keys() >= {"TrainingArguments", "SFTConfig", "DPOConfig", "GRPOConfig"}
    assert set(map(tuple, found["warmup"].values())) == {(100, 1000, 7)}


def test_command_lines_copies_and_checkpoints_keep_the_limit(found: dict[str, Any]) -> None:
    assert found["limits"] == {"built": 64, "pickled": 64, "parsed": 64, "saved": 64}
    assert found["parsed_warmup"] == 100


def test_a_batch_that_cuts_groups_is_raised(found: dict[str, Any]) -> None:
    assert found["batch"] == [6, 6]


def test_a_config_knows_whether_the_correction_was_left_out(found: dict[str, Any]) -> None:
    assert found["left_out"] == [found["has_correction"], False], "a command line gives every field"


def test_trainers_take_a_tokenizer(found: dict[str, Any]) -> None:
    assert found["tokenizer"] == {"SFTTrainer": True, "GRPOTrainer": True}
    assert found["sft_fields"] == [33, "words"]


def test_chat_templates_return_ids(found: dict[str, Any]) -> None:
    assert found["ids"] is True


def test_prompts_of_a_training_on_transformers_are_cut_from_the_left(found: dict[str, Any]) -> None:
    assert found["generated_from"]
    assert all(ids in found["cut_prompts"] for ids in found["generated_from"])


def test_undone_and_off_the_error_is_upstreams_and_off_says_what_to_write(found: dict[str, Any]) -> None:
    assert found["undone"] == {"warmup_ratio": found["undone"]["warmup_ratio"], "tokenizer": []}
    (note,) = found["off"]["tokenizer"]
    assert "write processing_class" in note
    assert 'call trlpatch.PatchFastRL(compat="on")' in note
    if not found["has_warmup_ratio"]:
        assert found["undone"]["warmup_ratio"] == []
        assert "write warmup_steps" in found["off"]["warmup_ratio"][0]
