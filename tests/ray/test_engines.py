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
    NoEngineLeft,
    RayError,
    RolloutTimeout,
    StaleAdapter,
    WrongVersion,
)
from trlpatch.ray.actor import LLMRayActor
from trlpatch.ray.calls import gather
from trlpatch.ray.engines import RayEngines, all_engines
from trlpatch.ray.messages import EngineInfo, RolloutRequest, Version
from trlpatch.ray.prefetch import _Ask
from trlpatch.ray.rollout import require_asked
from trlpatch.ray.supervision import Supervisor
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


def request_of(engines: RayEngines) -> RolloutRequest:
    return RolloutRequest(["a"], [FakeParams(2)], adapter=engines.adapter_version, weights=engines.weights_version)


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


def test_the_prompts_of_an_engine_that_dies_are_asked_of_another(engines: RayEngines) -> None:
    engines.handles[1].dead = True
    texts = [f"p{number}" for number in range(8)]
    outputs = engines.generate(texts, FakeParams(), use_tqdm=False)
    assert [output.prompt for output in outputs] == texts
    assert "1 of 2 rollout engines serve: engine 1 is lost (engine 1 died" in engines.supervisor.degraded
    assert "2 Ray actors on 10.0.0.0, 10.0.0.1; 1 of 2 rollout engines serve" in describe(engines, state_of(engines))
    with pytest.raises(EngineLost, match="engine 1 was asked, and does not serve"):
        engines.submit(1, request_of(engines))
    engines.handles[0].dead = True
    with pytest.raises(NoEngineLeft):
        engines.generate(texts, FakeParams(), use_tqdm=False)


def test_an_engine_that_dies_is_replaced_and_given_the_adapter(engines: RayEngines) -> None:
    info = engines.infos[0]

    def build(index: int) -> Handle:
        actor = LLMRayActor(index, {}, build=lambda _: FakeLLM())
        actor.ready = lambda: info  # type: ignore[method-assign]

        def publish(adapter: Any, version: int) -> None:
            actor.stepper.version = Version(version, "0")

        actor.publish_adapter = publish  # type: ignore[method-assign]
        return Handle(actor)

    supervisor = Supervisor(build, 1, Timeouts(sync=30.0))
    made = RayEngines(engines.handles[:1], [info], supervisor=adopted(supervisor, engines.handles[:1], [info]))
    made.adapter_version, made._live, made.adapter_ref = 3, lora("trlpatch-v3"), "adapter"
    engines.handles[0].dead = True
    texts = [f"p{number}" for number in range(8)]
    outputs = made.generate(texts, FakeParams(), use_tqdm=False)
    assert [output.prompt for output in outputs] == texts
    assert made.handles[0] is not engines.handles[0]
    assert made.handles[0].actor.stepper.version == made.version == Version(3, "0")
    assert made.ask(request_of(made)).outputs[0].prompt == "a"
    made.shutdown()


def test_an_engine_that_an_update_for_all_has_reached_is_sent_nothing(engines: RayEngines) -> None:
    engines.weights_version = "4"
    handle = engines.handles[0]
    assert not engines.supervisor.restore(handle, 0), "nobody has the weights"
    handle.actor.stepper.version = Version(0, "4")
    assert engines.supervisor.restore(handle, 0)


def adopted(supervisor: Supervisor, handles: list[Any], infos: list[EngineInfo]) -> Supervisor:
    supervisor.adopt(handles, infos)
    return supervisor


def test_an_engine_of_another_version_is_not_asked_again(engines: RayEngines) -> None:
    engines.handles[1].actor.stepper.version = Version(0, "7")
    outputs = engines.generate(["a", "b"], FakeParams(), use_tqdm=False)
    assert [output.prompt for output in outputs] == ["a", "b"]
    assert "engine 1 had other weights than were asked for" in engines.supervisor.degraded
    assert isinstance(engines.supervisor.faults[0].error, WrongVersion)


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


def test_what_was_generated_ahead_is_the_same_question_with_the_adapter_of_another_step(engines: RayEngines) -> None:
    asked: list[_Ask] = []

    class Ahead:
        def asked(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
            asked.append(_Ask(method, args, kwargs))
            return []

    engines._prefetched = Ahead()  # type: ignore[assignment]
    params = FakeParams()
    for name in ("trlpatch-v1", "trlpatch-v2"):
        engines.generate(["a"], params, use_tqdm=False, lora_request=lora(name))
        engines.chat([{"role": "user", "content": "a"}], params, False, lora(name))
    assert asked[0].asks_the_same(asked[2])
    assert asked[1].asks_the_same(asked[3])
    assert not asked[0].asks_the_same(asked[1])


def test_a_trainer_leaves_gpus_to_engines(engines: RayEngines) -> None:
    class Arguments:  # as transformers.TrainingArguments: without a launcher all visible GPUs are the trainer's
        _n_gpu = 2

        @property
        def n_gpu(self) -> int:
            return self._n_gpu

    arguments = Arguments()
    engines.prepare_trainer(object(), arguments)
    assert arguments.n_gpu == 1
    engines.prepare_trainer(object(), object())


def test_what_trl_pushes_is_sent_before_the_next_prompts(engines: RayEngines) -> None:
    class Sender:
        sent: list[Any] = []  # noqa: RUF012 - of one test

        def send(self, named: Any, version: str) -> None:
            self.sent.append(([name for name, _ in named], version))
            for handle in engines.handles:
                handle.actor.stepper.version = Version(0, version)
            engines.took_weights(version)

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
    made = RayEngines(engines.handles, engines.infos, Timeouts(rollout=0.01))
    for handle in engines.handles:
        handle.actor.pause()
    with pytest.raises(RayError, match=r"its prompts were not answered after 0\.01 s.*TRLPATCH_RAY_ROLLOUT_TIMEOUT"):
        made.generate(["a", "b"], FakeParams(), use_tqdm=False)


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


def test_an_engine_that_is_awake_is_not_woken(engines: RayEngines) -> None:
    woken: list[int] = []
    for handle in engines.handles:
        index = handle.actor.index
        wake = {"sleep": lambda level: None, "wake_up": lambda tags, index=index: woken.append(index)}
        handle.actor.stepper.between_steps(lambda llm, wake=wake: vars(llm).update(wake))
    engines.handles[0].actor.sleep(1)
    engines.wake_up()
    assert woken == [0], "the other one took a lost one's place while all slept"
    assert [health.state for health in engines.health()] == ["running"] * 2


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
