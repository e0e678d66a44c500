"""Which backend an engine gets, and that only the backends know where its workers are."""

from __future__ import annotations

import gc
import graphlib
import inspect
import re
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub
from trlpatch.engine import guards
from trlpatch.engine.backend import backend_of
from trlpatch.engine.describe import describe
from trlpatch.engine.inprocess import InProcessBackend
from trlpatch.engine.probes import KV_CACHE, WEIGHTS
from trlpatch.engine.state import forget, known_engines, state_of
from trlpatch.engine.workers import ExecutorBackend, WorkersBackend
from trlpatch.errors import CannotShare, EngineBusy

ENGINE = Path(guards.__file__).parent


def with_workers_elsewhere() -> RecordingEngineStub:
    """As MultiprocExecutor: it is here, and has no `driver_worker`."""
    engine = RecordingEngineStub()
    del engine.llm_engine.model_executor.driver_worker
    return engine


@pytest.mark.parametrize(
    ("engine", "kind", "location"),
    [
        (RecordingEngineStub(), InProcessBackend, ""),
        (with_workers_elsewhere(), ExecutorBackend, "workers in other processes"),
        (RecordingEngineStub(tells_tags=False), WorkersBackend, "engine core in another process"),
    ],
)
def test_the_backend_follows_from_where_the_executor_and_its_workers_are(
    engine: RecordingEngineStub, kind: type, location: str
) -> None:
    backend = backend_of(engine)
    assert type(backend) is kind
    assert backend.location == location
    assert state_of(engine).backend is backend is backend_of(engine)
    forget(engine)
    assert backend_of(engine) is not backend


@pytest.mark.parametrize("engine", [with_workers_elsewhere(), RecordingEngineStub(tells_tags=False)])
def test_workers_elsewhere_cannot_be_looked_into(engine: RecordingEngineStub, tmp_path: Path) -> None:
    backend = backend_of(engine)
    assert backend.base_mismatch(None) is None  # type: ignore[arg-type]
    assert backend.adapter_misfit(tmp_path) is None
    with pytest.raises(CannotShare, match="another process; set VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        backend.worker_model()
    assert backend.new_adapter_sync().description.startswith("through files in ")


def test_looking_at_an_engine_does_not_make_it_known_nor_keep_it_alive() -> None:
    engine = RecordingEngineStub()
    backend_of(engine)
    assert all(known is not engine for known, _ in known_engines())
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None


def test_what_sleeps_is_the_executors_word_and_else_the_backends_own() -> None:
    here, elsewhere = RecordingEngineStub(sleep=True), RecordingEngineStub(sleep=True, tells_tags=False)
    here.unmapped = {WEIGHTS, "a newer pool"}
    assert backend_of(here).asleep() == {WEIGHTS}
    assert backend_of(here).unmapped() == {WEIGHTS, "a newer pool"}
    assert backend_of(elsewhere).asleep() == set()
    backend_of(elsewhere).mark_asleep()
    backend_of(elsewhere).mark_awake(WEIGHTS)
    assert backend_of(elsewhere).asleep() == backend_of(elsewhere).unmapped() == {KV_CACHE}


@pytest.mark.parametrize("tells_tags", [True, False])
def test_a_prefix_cache_in_use_keeps_the_kv_cache_mapped(tells_tags: bool) -> None:
    engine = RecordingEngineStub(sleep=True, tells_tags=tells_tags)
    engine.reset_prefix_cache = lambda: False  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(EngineBusy, match="could not reset its prefix cache"):
        backend_of(engine).discard_kv_cache()
    assert backend_of(engine).asleep() == set()


@pytest.mark.parametrize("level", [1, 2])
def test_whoever_discards_the_weights_invalidates_the_adapter_sync(level: int) -> None:
    engine = RecordingEngineStub(sleep=True)
    state, sync = state_of(engine), RecordingAdapterSync()
    state.adapter_sync, state.policy_location = sync, "adapter"
    guards.slept(state, level)
    assert sync.invalidated == (level == 2)
    assert state.policy_location == ("adapter" if level == 1 else "checkpoint")


class LlmEngine:
    """Methods as vLLM declares them."""

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any = None) -> str:
        """Queue one request."""
        return request_id

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Unmap."""

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Map."""


@pytest.mark.parametrize("name", ["add_request", "sleep", "wake_up"])
def test_guarded_methods_keep_their_name_signature_and_docstring(name: str) -> None:
    engine = RecordingEngineStub(tells_tags=False)
    inner = engine.llm_engine = LlmEngine()  # type: ignore[assignment]
    before = (inspect.signature(getattr(inner, name)), inspect.getdoc(getattr(inner, name)))
    guards.install(engine, state_of(engine))
    guarded = getattr(inner, name)
    assert name in vars(inner), "it is guarded"
    assert (inspect.signature(guarded), inspect.getdoc(guarded), guarded.__name__) == (*before, name)
    forget(engine)
    assert name not in vars(inner)


ASKS = re.compile(
    r"probes\.(executor|engine_module|engine_core|worker_lora_manager)\(|\bdriver_worker\b|(?<!vllm[./])model_executor"
)
MAY_ASK = {
    "backend.py": "it chooses",
    "inprocess.py": "it has them",
    "probes.py": "it is where the questions are put",
    "drain.py": "called by a backend whose engine core is here",
    "build.py": "takes down engines that are half built and have no backend",
    "registry.py": "of an engine whose adapter sync was in process, to find out that it is gone",
    "protocols.py": "declares them",
}


def test_nobody_else_asks_where_a_worker_is() -> None:
    asking = {file.name for file in ENGINE.rglob("*.py") if ASKS.search(file.read_text(encoding="utf-8"))}
    assert asking <= MAY_ASK.keys()


def test_no_module_of_the_engine_imports_in_a_circle_not_even_for_types() -> None:
    files = [
        *ENGINE.rglob("*.py"),
        *(ENGINE.parent / "policy").rglob("*.py"),
        *(ENGINE.parent / "hooks").rglob("*.py"),
    ]
    modules = {
        ".".join(file.relative_to(ENGINE.parents[1]).with_suffix("").parts): file.read_text(encoding="utf-8")
        for file in files
        if file.name != "__init__.py"
    }
    imports = re.compile(r"^ *from (trlpatch[\w.]*) import ([\w, ]+)", re.MULTILINE)
    graph = {
        module: {
            name
            for package, names in imports.findall(text)
            for name in (package, *(f"{package}.{one.split(' as ')[0].strip()}" for one in names.split(",")))
            if name in modules
        }
        for module, text in modules.items()
    }
    assert graph["trlpatch.engine.guards"] >= {"trlpatch.engine.state"}, "imports are read"
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_line_of_an_engine_says_where_its_workers_are() -> None:
    engine = with_workers_elsewhere()
    assert describe(engine, state_of(engine)).startswith("engine, built by TRL; workers in other processes; weights")
