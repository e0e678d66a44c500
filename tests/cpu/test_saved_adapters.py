"""Saved adapters on a real vLLM CPU engine: `model.load_lora(directory)` is what PEFT computes, or an error."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
vllm = pytest.importorskip("vllm")

import trlpatch  # noqa: E402
from tests.cpu.small_grpo import gap  # noqa: E402
from trlpatch.engine.lora_limits import MAX_CPU_LORAS  # noqa: E402
from trlpatch.errors import AdapterNotExpressible, RankAboveEngine, StaleAdapter  # noqa: E402

pytestmark = pytest.mark.cpu

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Any:
    return tiny.engine(model, max_cpu_loras=MAX_CPU_LORAS)


def policy(model: Path, engine: Any, *, seed: int = 3, **changes: Any) -> Any:
    made = trlpatch.attach_engine(tiny.policy(model, **changes), engine)
    tiny.move(made, seed=seed)
    return made


def difference(engine: Any, trained: Any, request: Any) -> float:
    outputs = engine.generate(tiny.prompts(3), params(), lora_request=request, use_tqdm=False)
    return max(gap(trained, output) for output in outputs)


def params() -> Any:
    return vllm.SamplingParams(max_tokens=8, temperature=1.0, logprobs=0)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 64, "down_proj": 3}},
    "rank_pattern": {"rank_pattern": {"q_proj": 4, "gate_proj": 16}},
    "both, rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 48}},
    "of one layer": {"alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 128}},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("safe", [True, False])
def test_a_saved_adapter_is_what_peft_computes(
    name: str, safe: bool, model: Path, engine: Any, tmp_path: Path
) -> None:
    trained = policy(model, engine, **CONFIGS[name])
    if safe:
        trained.save_lora(tmp_path)
    else:
        import torch
        from safetensors.torch import load_file

        trained.save_lora(tmp_path)
        weights = tmp_path / "adapter_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    request = trained.load_lora(str(tmp_path))
    assert difference(engine, trained, request) < TOLERANCE
    assert difference(engine, trained, trained.load_lora()) < TOLERANCE


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_vllm_would_leave_out_is_refused(init: str, model: Path, engine: Any, tmp_path: Path) -> None:
    trained = trlpatch.attach_engine(tiny.policy(model, init_lora_weights=init), engine)
    trained.save_lora(tmp_path)
    with pytest.raises(AdapterNotExpressible, match=f"'{init}' rewrites the base weights"):
        trained.load_lora(str(tmp_path))


def test_a_rank_that_only_a_pattern_has_is_checked(model: Path, engine: Any, tmp_path: Path) -> None:
    trained = policy(model, engine, rank_pattern={"q_proj": 32})
    trained.save_lora(tmp_path)
    with pytest.raises(RankAboveEngine, match=r"rank 32 \(rank_pattern\) is above the engine's max_lora_rank=16"):
        trained.load_lora(str(tmp_path))


def test_another_content_is_another_adapter_whatever_its_time(model: Path, engine: Any, tmp_path: Path) -> None:
    """As `cp -p` and `rsync -a` leave it: older than a file beside it."""
    trained = policy(model, engine)
    trained.save_lora(tmp_path / "served")
    first = trained.load_lora(str(tmp_path / "served"))
    assert difference(engine, trained, first) < TOLERANCE
    tiny.move(trained, seed=4)
    trained.save_lora(tmp_path / "newer")
    old = (tmp_path / "served" / "adapter_model.safetensors").stat().st_mtime_ns - 10**12
    os.utime(tmp_path / "newer" / "adapter_model.safetensors", ns=(old, old))
    shutil.copy2(tmp_path / "newer" / "adapter_model.safetensors", tmp_path / "served")
    second = trained.load_lora(str(tmp_path / "served"))
    assert second.lora_int_id != first.lora_int_id
    assert difference(engine, trained, second) < TOLERANCE
    (tmp_path / "served" / "README.md").write_text("of no weight")
    assert trained.load_lora(str(tmp_path / "served")).lora_int_id == second.lora_int_id


def test_a_directory_written_before_its_first_use_is_refused(model: Path, engine: Any, tmp_path: Path) -> None:
    """vLLM reads it when the first request comes, under the name of what it was."""
    trained = policy(model, engine)
    trained.save_lora(tmp_path)
    first = trained.load_lora(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    assert difference(engine, trained, first) < TOLERANCE, "the same content, and now it has been read"
    kept = {name: value.clone() for name, value in trained.state_dict().items() if "lora_" in name}
    tiny.move(trained, seed=8)
    trained.save_lora(tmp_path)
    second = trained.load_lora(str(tmp_path))
    tiny.move(trained, seed=9)
    trained.save_lora(tmp_path)
    with pytest.raises(StaleAdapter, match="was written since, and vLLM, which reads it now"):
        engine.generate(["a"], params(), lora_request=second, use_tqdm=False)
    assert not engine.llm_engine.has_unfinished_requests()
    assert difference(engine, trained, trained.load_lora(str(tmp_path))) < TOLERANCE
    trained.load_state_dict(kept, strict=False)
    assert difference(engine, trained, first) < TOLERANCE, "the engine has it, whatever became of the files"


@pytest.mark.parametrize("live_first", [True, False])
def test_live_and_saved_adapters_in_one_call(live_first: bool, model: Path, engine: Any, tmp_path: Path) -> None:
    others = [policy(model, engine, seed=seed) for seed in (5, 6)]
    for number, other in enumerate(others):
        other.save_lora(tmp_path / str(number))
    trained = policy(model, engine, seed=7)
    models = [trained, *others, trained, others[0]]
    requests = [trained.load_lora(), *(trained.load_lora(str(tmp_path / str(number))) for number in (0, 1))]
    requests += [requests[0], requests[1]]
    if not live_first:
        models, requests = models[1:], requests[1:]
    outputs = engine.generate(tiny.prompts(len(models)), params(), lora_request=requests, use_tqdm=False)
    assert max(map(gap, models, outputs)) < TOLERANCE
