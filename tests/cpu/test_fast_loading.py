"""A load that fails or is interrupted leaves nothing, with and without another engine beside it."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import dataclasses
import gc
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from tests import processes  # noqa: E402
from tests.cpu.fast import PLACES, SMALL, Surroundings, draw_seeds, interrupt, random_state, rollout  # noqa: E402
from trlpatch import FastLanguageModel  # noqa: E402
from trlpatch.errors import EngineMismatch  # noqa: E402
from trlpatch.loading import loading  # noqa: E402

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    """An engine that is alive beside the one that fails."""
    return FastLanguageModel.from_pretrained(checkpoint, **SMALL)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.usefixtures("loaded")
def test_an_interrupted_load_leaves_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    now = Surroundings()
    monkeypatch.setattr(place, interrupt)
    with pytest.raises(KeyboardInterrupt) as raised:
        FastLanguageModel.from_pretrained(checkpoint, **SMALL)
    now.check()
    del raised


FRESH = """
import sys
from unittest import mock
from tests.cpu.fast import PLACES, SMALL, Surroundings, interrupt, rollout
from trlpatch import FastLanguageModel

for place in PLACES.values():
    now = Surroundings()
    with mock.patch(place, interrupt):
        try:
            FastLanguageModel.from_pretrained(sys.argv[1], **SMALL)
        except KeyboardInterrupt as error:
            now.check()
            assert now.engines == 0
        else:
            raise AssertionError(place)
model, _ = FastLanguageModel.from_pretrained(sys.argv[1], **SMALL)
print("tokens", len(rollout(model).outputs[0].token_ids))
"""


def test_a_process_without_another_engine_gets_its_distributed_state_back(checkpoint: Path) -> None:
    environ = {**os.environ, "PYTHONWARNINGS": "default", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FRESH, str(checkpoint)]
    done = processes.run(command, env=environ, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert "tokens 8" in done.stdout


def test_a_load_that_fails_leaves_nothing_and_can_be_tried_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = Surroundings()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("vllm.v1.engine.core.EngineCore._initialize_kv_caches", fail)
        with pytest.raises(MemoryError, match=r"Set gpu_memory_utilization to 0.3 to 0.5.*can be tried again"):
            FastLanguageModel.from_pretrained(checkpoint, **SMALL)
    now.check()
    model, _ = FastLanguageModel.from_pretrained(checkpoint, **SMALL)
    assert len(rollout(model).outputs[0].token_ids) == 8


def test_a_model_that_computes_something_else_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny.checkpoint(tmp_path, seed=1)
    now = Surroundings()
    real = loading.load_transformers_model
    kept: list[Any] = []

    def load_another(config: Any, hf_config: Any, dtype: Any) -> Any:
        model = real(dataclasses.replace(config, model_name=str(other)), hf_config, dtype)
        kept.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_transformers_model", load_another)
    with pytest.raises(EngineMismatch, match="do not compute the same function") as raised:
        FastLanguageModel.from_pretrained(checkpoint, **SMALL)
    now.check()
    assert kept[0]() is None, "the exception's frames hold the model"
    assert raised.value.__traceback__ is not None


def test_a_second_engine_beside_the_first(loaded: tuple[Any, Any], checkpoint: Path) -> None:
    before = draw_seeds()
    model, _ = FastLanguageModel.from_pretrained(checkpoint, dtype=torch.bfloat16, max_lora_rank=8, **SMALL)
    assert random_state() == before
    assert model.dtype == torch.bfloat16
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in os.environ, "set by this test's harness, not by loading"
    for one in (model, loaded[0]):
        assert len(rollout(one).outputs[0].token_ids) == 8
    engine = weakref.ref(model.vllm_engine)
    del one, model
    gc.unfreeze()
    gc.collect()
    assert engine() is None
    assert len(rollout(loaded[0]).outputs[0].token_ids) == 8  # vLLM 0.31 and newer: the groups are both engines'
