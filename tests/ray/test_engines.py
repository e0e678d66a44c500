"""The trainer's side: what `RayEngines` does with prompts, answers, failures. Without Ray and vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ray.fake_ray import FakeRay, Handle, fake_ray
from tests.ray.fakes import FakeLLM, FakeParams
from trlpatch.engine import guards
from trlpatch.engine.backend import backend_of
from trlpatch.engine.describe import describe
from trlpatch.engine.state import forget, state_of
from trlpatch.errors import (
    AdapterNotExpressible,
    CannotShare,
    EngineAsleep,
    EngineLost,
    RolloutTimeout,
    StaleAdapter,
    WrongVersion,
)
from trlpatch.ray.actor import LLMRayActor
from trlpatch.ray.calls import gather
from trlpatch.ray.engines import RayEngines, all_engines
from trlpatch.ray.messages import EngineInfo, RolloutRequest, Version
from trlpatch.ray.rollout import require_asked
from trlpatch.ray.timeouts import Timeouts

__all__ = ["fake_ray"]

CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(model="/models/tiny", enable_sleep_mode=True, dtype="torch.float32"),
    parallel_config=SimpleNamespace(tensor_parallel_size=1),
    scheduler_config=SimpleNamespace(max_num_seqs=4),
    lora_config=SimpleNamespace(max_lora_rank=16),
)


def lora(name: str) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=1, lora_path=f"/{name}")


@pytest.fixture
def engines(fake_ray: FakeRay) -> Iterator[RayEngines]:
    actors = [LLMRayActor(index, {}, build=lambda _: FakeLLM()) for index in range(2)]
    infos = [EngineInfo(index, "/models/tiny", CONFIG, "0", f"10.0.0.{index}", index, (), 1.0) for index in range(2)]
    made = RayEngines([Handle(actor) for actor in actors], infos, Timeouts(sync=30.0))
    yield made
    forget(made)  # type: ignore[arg-type]
    made.shutdown()


def sent(engines: RayEngines, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Every request from now on, with the engine that it goes to."""
    noted: list[tuple[int, Any]] = []
    submit = engines.submit

    def noting(index: int, request: Any) -> Any:
        noted.append((index, request))
        return submit(index, request)

    monkeypatch.setattr(engines, "submit", noting)
    return noted


def test_prompts_go_to_both_engines_and_answers_come_back_in_order(
    engines: RayEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = sent(engines, monkeypatch)
    texts = [f"prompt {number}" for number in range(20)]
    lengths = [1 + number % 5 for number in range(20)]
    outputs = engines.generate(texts, [FakeParams(length) for length in lengths], use_tqdm=False)
    assert [output.prompt for output in outputs] == texts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert {index for index, _ in noted} == {0, 1}
    assert not engines.llm_engine.has_unfinished_requests()


def test_sampling_parameters_and_adapters_are_one_for_all_or_one_for_each(
    engines: RayEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = sent(engines, monkeypatch)
    saved = lora("mine")
    engines.generate(["a", "b"], FakeParams(), use_tqdm=False, lora_request=[None, saved])
    by_adapter = {request.prompts[0]: request.lora_request for _, request in noted}
    assert by_adapter == {"a": None, "b": saved}
    with pytest.raises(ValueError, match="sampling_params: 3 for 2 prompts"):
        engines.generate(["a", "b"], [FakeParams()] * 3, use_tqdm=False)


def test_requests_added_by_hand_are_answered_by_one_step(engines: RayEngines) -> None:
    inner = engines.llm_engine
    inner.add_request("x", "a", FakeParams())
    inner.add_request("y", "b", FakeParams())
    inner.add_request("z", "c", FakeParams())
    inner.abort_request(["z"])
    assert inner.get_num_unfinished_requests() == 2
    assert [(output.request_id, output.prompt) for output in inner.step()] == [("x", "a"), ("y", "b")]
    assert not inner.has_unfinished_requests()


def test_what_the_engine_says_of_a_prompt_is_raised_as_it_is(engines: RayEngines) -> None:
    with pytest.raises(ValueError, match="a bad prompt"):
        engines.generate(["good", "bad"], FakeParams(), use_tqdm=False)
    assert [health.running for health in engines.health()] == [0, 0]
    assert len(engines.generate(["good"], FakeParams(), use_tqdm=False)) == 1


def test_an_engine_that_dies_ends_the_rollout_where_nobody_replaces_it(engines: RayEngines) -> None:
    engines.handles[1].dead = True
    with pytest.raises(EngineLost, match="generate: rollout engine 1 is lost, its actor has died: The actor died"):
        engines.generate([f"p{number}" for number in range(8)], FakeParams(), use_tqdm=False)
    assert engines.lost_engines() == [1]


def test_the_prompts_of_an_engine_that_was_replaced_are_asked_again_once(engines: RayEngines) -> None:
    class Supervisor:
        replaced: list[int] = []  # noqa: RUF012 - of one test

        def check(self) -> None: ...

        def lost(self, index: int, error: BaseException) -> None:
            self.replaced.append(index)
            engines.handles[index] = Handle(engines.handles[index].actor)

    engines.supervisor = Supervisor()
    engines.handles[1].dead = True
    texts = [f"p{number}" for number in range(8)]
    outputs = engines.generate(texts, FakeParams(), use_tqdm=False)
    assert [output.prompt for output in outputs] == texts
    assert Supervisor.replaced == [1]


def test_a_response_of_another_version_is_not_used(engines: RayEngines) -> None:
    engines.handles[1].actor.stepper.version = Version(0, "7")
    with pytest.raises(WrongVersion, match="engine 1: asked for adapter 0 on weights 0, it holds adapter none"):
        engines.generate(["a", "b"], FakeParams(), use_tqdm=False)


def test_a_version_that_changes_in_flight_is_not_used(engines: RayEngines) -> None:
    actor = engines.handles[0].actor
    actor.pause()
    request = RolloutRequest(["a"], [FakeParams(2)], weights=engines.weights_version)
    asked = engines.submit(0, request)
    actor.stepper.between_steps(lambda _: setattr(actor.stepper, "version", Version(0, "9")))
    actor.resume()
    response = asked.result()
    assert response.mixed
    assert (response.first_version.weights, response.last_version.weights) == ("0", "9")
    with pytest.raises(WrongVersion, match="engine 0 sampled with adapter none, weights 9, asked for was"):
        require_asked(response, request)


def test_a_request_without_an_adapter_is_answered_whatever_adapter_the_engine_holds(engines: RayEngines) -> None:
    for handle in engines.handles:
        handle.actor.stepper.version = Version(4)
    assert len(engines.generate(["a", "b"], FakeParams(), use_tqdm=False)) == 2


def test_what_trl_pushes_is_sent_before_the_next_prompts(engines: RayEngines) -> None:
    class Sender:
        sent: list[Any] = []  # noqa: RUF012 - of one test

        def send(self, named: Any, version: str) -> None:
            self.sent.append(([name for name, _ in named], version))
            for handle in engines.handles:
                handle.actor.stepper.version = Version(0, version)

    engines.weight_sender = Sender()
    model = engines.llm_engine.model_executor.driver_worker.model_runner.model
    assert model.load_weights([("a.weight", Tensor())]) == {"a.weight"}
    model.load_weights([("b.weight", Tensor())])
    assert len(engines.generate(["a", "b"], FakeParams(), use_tqdm=False)) == 2
    engines.reset_prefix_cache()
    assert Sender.sent == [(["a.weight", "b.weight"], "1")]
    assert engines.version == Version(0, "1")


class Tensor:
    def detach(self) -> Tensor:
        return self

    def to(self, *_: Any, **__: Any) -> Tensor:
        return self


def test_an_interrupt_leaves_no_request_in_an_engine(engines: RayEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    for handle in engines.handles:
        handle.actor.pause()
    submit = engines.submit
    count = iter(range(100))

    def interrupted(index: int, request: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return submit(index, request)

    monkeypatch.setattr(engines, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engines.generate([f"p{number}" for number in range(8)], FakeParams(), use_tqdm=False)
    for handle in engines.handles:
        handle.drain()
        assert handle.actor.health().running + handle.actor.health().waiting == 0
    assert not engines.llm_engine.has_unfinished_requests()


def test_a_rollout_has_a_time_limit_where_one_is_asked_for(engines: RayEngines) -> None:
    engines.timeouts = Timeouts(rollout=0.01)
    for handle in engines.handles:
        handle.actor.pause()
    with pytest.raises(RolloutTimeout, match=r"generate: 2 messages of 2 prompts were not answered in 0\.01 s"):
        engines.generate(["a", "b"], FakeParams(), use_tqdm=False)


def test_a_call_that_is_not_answered_names_the_engines(fake_ray: FakeRay) -> None:
    never: Future[Any] = Future()
    with pytest.raises(RolloutTimeout, match=r"reset_prefix_cache: no answer of rollout engine 1 in 0\.01 s"):
        gather([fake_ray.put(True), never], "reset_prefix_cache", 0.01)


def test_adapters_of_versions_past_are_refused(engines: RayEngines) -> None:
    engines._live, engines.adapter_version = lora("trlpatch-v5"), 5
    assert engines.adapter_of(lora("trlpatch-v5")) == 5
    assert engines.adapter_of(lora("saved")) == 0
    assert engines.adapter_of(None) == 0
    with pytest.raises(StaleAdapter, match="they have 'trlpatch-v5'"):
        engines.adapter_of(lora("trlpatch-v4"))


def test_the_backend_is_their_own_and_status_shows_them(engines: RayEngines) -> None:
    llm: Any = engines
    backend = backend_of(llm)
    assert type(backend).__name__ == "RayBackend"
    assert backend.location == "2 Ray actors on 10.0.0.0, 10.0.0.1"
    assert "tiny, built by TRL; 2 Ray actors on 10.0.0.0" in describe(llm, state_of(llm))
    assert backend.kv_sleep_unsupported_reason() == "the engines have devices of their own"
    with pytest.raises(CannotShare):
        backend.worker_model()
    assert [one.location for one in engines.replicas] == ["1 Ray actor on 10.0.0.0", "1 Ray actor on 10.0.0.1"]
    assert engines in all_engines()


def test_guards_see_requests_sleep_and_wake(engines: RayEngines) -> None:
    llm: Any = engines
    for handle in engines.handles:
        handle.actor.stepper.between_steps(_with_sleep)
    state = state_of(llm)
    guards.install(llm, state)
    engines.sleep(1)
    assert state.backend.asleep() == {"weights", "kv_cache"}
    assert [health.state for health in engines.health()] == ["asleep"] * 2
    with pytest.raises(EngineAsleep):
        engines.generate(["a"], FakeParams(), use_tqdm=False)
    engines.wake_up()
    assert state.backend.asleep() == set()
    assert len(engines.generate(["a"], FakeParams(), use_tqdm=False)) == 1
    state.live_request = lambda: lora("saved")
    (output,) = engines.generate(["a"], FakeParams(), use_tqdm=False)
    assert output.lora == "saved", "supplied by the guard"


def _with_sleep(llm: Any) -> None:
    llm.sleep = lambda level: None
    llm.wake_up = lambda tags: None


def test_full_weights_need_a_sender(engines: RayEngines) -> None:
    model = engines.llm_engine.model_executor.driver_worker.model_runner.model
    with pytest.raises(AdapterNotExpressible, match="no way for them"):
        model.load_weights([])


def test_calls_reach_every_engine(engines: RayEngines) -> None:
    assert engines.on_each("call", type) == [FakeLLM, FakeLLM]
    assert engines.of_first(type) is FakeLLM
    with pytest.raises(KeyError):
        engines.on_each("call", _fails)


def _fails(_: Any) -> None:
    raise KeyError("x")


def test_shutting_down_ends_threads_and_gives_resources_back(engines: RayEngines, fake_ray: FakeRay) -> None:
    handles, released = engines.handles, []
    engines._release = lambda: released.append(True)
    engines.shutdown()
    assert fake_ray.killed == handles
    assert released == [True]
    assert engines not in all_engines()
    engines.shutdown()
    assert released == [True]
