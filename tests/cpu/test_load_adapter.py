"""`from_pretrained` of a PEFT adapter on a real vLLM CPU engine: rollouts carry it from the first one on."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

from tests import processes
from tests.cpu.fast import SMALL, rollout
from trlpatch import FastLanguageModel
from trlpatch.engine import probes

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # float32 on both sides
MOVED = 1e-2
PUSHED_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 24, saved by PEFT, of a model that is saved beside it."""
    root = tmp_path_factory.mktemp("models")
    made = tiny.policy(tiny.checkpoint(root / "base"), r=24)
    tiny.move(made, seed=1)
    made.save_pretrained(root / "adapter")
    return root / "adapter"


def gap(policy: Any, output: Any) -> float:
    theirs = tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)
    return float((tiny.engine_logprobs(output) - theirs).abs().max())


def test_rollouts_carry_a_loaded_adapter_at_once(adapter: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(adapter, max_lora_rank=8, random_state=3407, **SMALL)
    assert probes.max_lora_rank(model.vllm_engine) == 32, "24 is no rank that vLLM allows, 8 too small"
    assert model.vllm_engine.llm_engine.vllm_config.model_config.seed == 3407
    assert gap(model, rollout(model)) < TOLERANCE
    assert gap(model, rollout(model, lora_request=None)) > MOVED
    tiny.move(model, seed=2)
    assert gap(model, rollout(model)) < TOLERANCE, "it is trained on"


def test_the_engine_reads_the_tokenizer_beside_an_adapter_without_an_error(adapter: Path, tmp_path: Path) -> None:
    """vLLM looks for config.json beside a tokenizer; in the directory of an adapter there is none."""
    from transformers import AutoTokenizer

    place = shutil.copytree(adapter, tmp_path / "adapter")
    words = AutoTokenizer.from_pretrained(adapter.parent / "base")
    words.chat_template = "{{ 'the cat' }}"
    words.save_pretrained(place)
    errors: list[str] = []
    listener = logging.Handler(logging.ERROR)
    listener.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(listener)
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(place, **SMALL)
    finally:
        logging.getLogger("vllm").removeHandler(listener)
    assert errors == []
    engines = model.vllm_engine.get_tokenizer()
    assert engines.chat_template == tokenizer.chat_template == words.chat_template
    assert engines.get_vocab() == tokenizer.get_vocab()


@pytest.mark.release
def test_grpo_goes_on_training_it(adapter: Path, tmp_path: Path) -> None:
    report = _train("adapter", tmp_path, str(adapter))
    assert report["engines_built"] == 1
    assert report["uses_ours"]
    assert [one["step"] for one in report["rollouts"]] == [0, 1]
    assert len({one["adapter"] for one in report["rollouts"]} - {None}) == 2
    assert max(one["gap"] for one in report["rollouts"]) < PUSHED_TOLERANCE
    assert report["trained"] == ["lora_A", "lora_B"]
    assert report["moved"] > 0


@pytest.mark.release
def test_grpo_trains_every_weight_and_pushes_them(adapter: Path, tmp_path: Path) -> None:
    report = _train("full", tmp_path, str(adapter.parent / "base"))
    assert report["engines_built"] == 1
    assert report["uses_ours"]
    assert not report["lora"], "no LoRA buffers that nobody fills"
    assert [one["adapter"] for one in report["rollouts"]] == [None, None]
    assert report["every_weight"]
    assert report["moved"] > 0.9, "the share of parameters that the two steps moved"
    assert [one["step"] for one in report["rollouts"]] == [0, 1]
    assert max(one["gap"] for one in report["rollouts"]) < PUSHED_TOLERANCE, "the second rollout is of moved weights"


def _train(case: str, directory: Path, model: str) -> dict[str, Any]:
    out = directory / "report.json"
    environ = {**os.environ, "PYTHONWARNINGS": "default"}
    done = processes.run_module("tests.cpu.loaded_training", [case, model, str(out)], env=environ, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    report: dict[str, Any] = json.loads(out.read_text())
    return report
