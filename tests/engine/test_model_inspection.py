"""vLLM inspects the model class of an in-process engine in this process, and as ever of any other."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict

import pytest

from trlpatch.engine.model_inspection import inspected_here

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _no_subprocess(*_: object, **__: object) -> None:
    raise RuntimeError("a second interpreter")


def _is_here() -> bool:
    """Whether vLLM would inspect a model class in this process; a subprocess cannot be given this one's list."""
    from vllm.model_executor.models import registry

    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry.subprocess, "run", _no_subprocess)
        with contextlib.suppress(Exception):
            registry._run_in_subprocess(lambda: seen.append(1))
    return bool(seen)


def test_an_engine_of_this_process_is_inspected_here_and_only_while_it_is_built() -> None:
    with inspected_here({}):
        assert _is_here()
    assert not _is_here()


@pytest.mark.parametrize(
    "arguments", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"data_parallel_size": 2}]
)
def test_workers_elsewhere_are_forked_from_a_process_without_the_model(arguments: dict[str, int]) -> None:
    with inspected_here(arguments):
        assert not _is_here()
    with inspected_here({**arguments, "distributed_executor_backend": "external_launcher"}):
        assert _is_here()


@pytest.mark.parametrize("backend", ["mp", "ray", object])
def test_so_is_the_one_worker_of_an_executor_with_processes(backend: object) -> None:
    with inspected_here({"distributed_executor_backend": backend}):
        assert not _is_here()
    with inspected_here({"distributed_executor_backend": "uni"}):
        assert _is_here()


def test_an_engine_core_of_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with inspected_here({}):
        assert not _is_here()


def test_for_an_external_launcher_vllm_makes_it_one_process_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    from vllm.config import ParallelConfig

    with inspected_here({"distributed_executor_backend": "external_launcher"}):
        assert _is_here()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    ParallelConfig(distributed_executor_backend="external_launcher")
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "what in_process relies on"


def test_what_is_found_is_what_the_subprocess_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry._LazyRegisteredModel, "_load_modelinfo_from_cache", lambda *_: None)
    monkeypatch.setattr(registry._LazyRegisteredModel, "_save_modelinfo_to_cache", lambda *_: None)
    model = registry.ModelRegistry.models["Qwen2ForCausalLM"]
    there = model.inspect_model_cls()
    with inspected_here({}):
        assert asdict(model.inspect_model_cls()) == asdict(there)


def test_the_block_may_fail() -> None:
    with pytest.raises(RuntimeError, match="no memory"), inspected_here({}):
        raise RuntimeError("no memory")
    assert not _is_here()
