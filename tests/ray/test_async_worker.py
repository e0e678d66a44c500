"""The worker's thread: rewards, advantages, failures, stop; the transfer: adapters alone, full weights."""

from __future__ import annotations

import dataclasses
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.models import lora_model, randomize
from tests.ray.fake_async import LOGPROB, FakeAsyncEngines
from trlpatch.errors import AsyncNotSupported, RankAboveEngine, RolloutWorkerFailed
from trlpatch.ray.async_grpo.prompts import Progress
from trlpatch.ray.async_grpo.samples import release_of
from trlpatch.ray.async_grpo.scoring import scores
from trlpatch.ray.async_grpo.settings import RolloutSettings
from trlpatch.ray.async_grpo.transfer import RayWeightTransfer
from trlpatch.ray.async_grpo.versions import PolicyVersions
from trlpatch.ray.async_grpo.worker import RayRolloutWorker
from trlpatch.ray.messages import Version

pytestmark = pytest.mark.torch

WAIT = 60.0
"""Seconds for what takes milliseconds."""


@dataclasses.dataclass
class Sample:
    """As TRL 1.16's, without NumPy."""

    prompt: Any
    completion: Any
    input_ids: list[int]
    completion_mask: list[int]
    old_log_probs: list[float]
    advantage: float
    model_version: int
    group_id: int
    metrics: dict[str, float]
    enqueued_at: float | None = None


@dataclasses.dataclass
class ArraySample(Sample):
    """As TRL 1.16's."""

    input_ids: "numpy.ndarray"  # type: ignore[assignment]  # noqa: F821, UP037
    completion_mask: "numpy.ndarray"  # type: ignore[assignment]  # noqa: F821, UP037
    old_log_probs: "numpy.ndarray"  # type: ignore[assignment]  # noqa: F821, UP037


class Trainer:
    def __init__(self, rollout_worker: Any = None, weight_transfer: Any = None) -> None: ...


class Tokenizer:
    """Words are numbers."""

    response_schema = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> list[int]:
        assert kwargs["add_generation_prompt"] is True
        return self(messages[-1]["content"])["input_ids"]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(token) for token in token_ids)


TEXTS = [{"prompt": f"{10 + i} {11 + i}", "answer": i} for i in range(8)]


def worker(engines: FakeAsyncEngines, *functions: Any, rows: Any = TEXTS, sample: Any = Sample, **changes: Any) -> Any:
    versions = PolicyVersions()
    versions.sent(Version())
    versions.current = 1
    made = RayRolloutWorker(
        engines, rows, functions, release=release_of(sample, Trainer), versions=versions, ask=engines.ask,
        make_sampling_params=dict,
    )  # fmt: skip
    settings = RolloutSettings(2, 1, 4, 1, {"n": 2})
    made.configure(dataclasses.replace(settings, **changes), Tokenizer())
    made.versions = versions
    return made


def take(made: Any, count: int) -> list[Any]:
    return [made.rollout_buffer.get(timeout=WAIT) for _ in range(count)]


def test_samples_are_scored_in_this_process_and_come_in_order() -> None:
    threads = []

    async def length(completions: Any, **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def last(completion_ids: Any, answer: Any, prompts: Any, **_: Any) -> list[float | None]:
        threads.append(threading.current_thread())
        assert prompts == [f"{10 + answer[0]} {11 + answer[0]}"] * 2
        return [float(ids[0]) for ids in completion_ids]

    made = worker(FakeAsyncEngines(), length, last, lambda **_: [None, None])
    made.start()
    try:
        first, second, third, _ = take(made, 4)
    finally:
        made.stop()
    assert first.input_ids == [10, 11, 3, 2]
    assert first.completion_mask == [0, 0, 1, 1]
    assert first.old_log_probs == [0.0, 0.0, LOGPROB, LOGPROB]
    assert (first.advantage, second.advantage) == (pytest.approx(-1.0), pytest.approx(1.0))
    assert (first.group_id, third.group_id, first.model_version) == (0, 1, 1)
    assert first.completion == "3 2"
    named = {name: first.metrics[name] for name in ("reward", "reward_std", "rewards/length", "rewards/last")}
    assert named == {"reward": 6.0, "reward_std": 0.5, "rewards/length": 3.0, "rewards/last": 3.0}
    assert math.isnan(first.metrics["rewards/<lambda>"])
    assert threading.main_thread() not in threads


def test_conversations_are_rendered_and_answered_as_messages() -> None:
    made = worker(FakeAsyncEngines(), lambda **_: [0, 0], rows=[{"prompt": [{"role": "user", "content": "10"}]}])
    made.start()
    (first,) = take(made, 1)
    made.stop()
    assert first.completion == [{"role": "assistant", "content": "3 2"}]


def test_arrays_where_the_release_has_them() -> None:
    numpy = pytest.importorskip("numpy")
    made = worker(FakeAsyncEngines(), lambda **_: [0, 0], sample=ArraySample)
    made.start()
    (first,) = take(made, 1)
    made.stop()
    assert first.input_ids.dtype == numpy.int64
    assert first.old_log_probs.dtype == numpy.float32
    assert first.enqueued_at is not None


def test_advantages_leave_out_what_nobody_could_score() -> None:
    nan = math.nan
    found = scores({"a": [1.0, nan, 3.0, nan], "b": [nan, nan, 1.0, 2.0]}, 4)
    assert found.rewards[0] == 1.0
    assert math.isnan(found.rewards[1])
    assert list(found.rewards[2:]) == [4.0, 2.0]
    assert found.advantages[1] == 0.0
    assert sum(found.advantages) == pytest.approx(0.0)
    assert (found.mean, found.std) == (pytest.approx(7 / 3), pytest.approx(1.2472191289))
    assert list(scores({"a": [nan, nan]}, 2).advantages) == [0.0, 0.0]


def test_a_stale_prompt_is_asked_again_with_the_new_policy() -> None:
    engines = FakeAsyncEngines()
    engines.gate.clear()
    made = worker(engines, lambda **_: [0, 0], max_staleness=0)
    made.start()
    try:
        for _ in range(2):  # what is asked now waits, sampled with the version of now
            assert engines.arrived.acquire(timeout=WAIT)
        engines.held = Version(1)
        made.versions.sent(engines.version)
        made.update_model_version(2)
        engines.gate.set()
        fresh = take(made, 2)
        while not {0, 1} <= {sample.group_id for sample in fresh}:
            fresh += take(made, 1)
    finally:
        made.stop()
    assert {sample.model_version for sample in fresh} == {2}
    assert (made.totals.asked_again, made.totals.dropped) == (2, 4)


def test_a_failing_reward_function_ends_the_run_with_its_own_error() -> None:
    def fail(**_: Any) -> list[float]:
        raise KeyError("gold")

    made = worker(FakeAsyncEngines(), fail)
    made.start()
    with pytest.raises(RolloutWorkerFailed, match="KeyError") as error:
        made.rollout_buffer.get(timeout=WAIT)
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(RolloutWorkerFailed, match="KeyError"):
        made.check_health(300.0)
    made.stop()


def test_a_reward_function_must_score_every_completion() -> None:
    made = worker(FakeAsyncEngines(), lambda **_: [1.0])
    made.start()
    with pytest.raises(RolloutWorkerFailed, match="expected 2 rewards, one for each completion, found 1"):
        made.rollout_buffer.get(timeout=WAIT)
    made.stop()


def test_stop_does_not_wait_for_an_engine_and_start_begins_anew() -> None:
    engines = FakeAsyncEngines()
    engines.gate.clear()
    made = worker(engines, lambda **_: [0, 0])
    made.start()
    made.check_health(WAIT)
    made.stop()
    assert "abort" in engines.calls
    made.resume_from(Progress(5), 1)
    made.start()
    assert take(made, 1)[0].group_id == 5
    made.stop()


def test_without_its_callback_the_worker_says_so() -> None:
    engines = FakeAsyncEngines()
    made = RayRolloutWorker(engines, TEXTS, [len], release=release_of(Sample, Trainer), ask=engines.ask)
    with pytest.raises(RolloutWorkerFailed, match="expected the callback"):
        made.start()


def test_a_worker_that_gives_no_sign_of_life_is_reported() -> None:
    made = worker(FakeAsyncEngines(), lambda **_: [0, 0])
    made.start()
    try:
        made.check_health(WAIT)
        with pytest.raises(RolloutWorkerFailed, match="gave no sign of life"):
            made.check_health(-1.0)
    finally:
        made.stop()


# Weight transfer.


def lora_engines(rank: int = 8) -> FakeAsyncEngines:
    return FakeAsyncEngines(lora=SimpleNamespace(max_lora_rank=rank))


def test_an_adapter_goes_alone_and_is_not_merged() -> None:
    import torch

    model, engines, versions = lora_model(), lora_engines(), PolicyVersions()
    randomize(model)
    transfer = RayWeightTransfer(engines, versions)
    assert transfer.follow(model)
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = base.detach().clone()
    # As TRL 1.14 and newer, in a module of its own.
    sync = {"__name__": "trl.experimental.async_grpo.async_grpo_trainer"}
    exec(
        "def _sync_weight_merged(model, transfer):\n"
        "    transfer.pause(); model.merge_adapter()\n"
        "    changed = model.base_model.model.model.layers[0].self_attn.q_proj.merged\n"
        "    transfer.send_weights(iter(())); model.unmerge_adapter(); transfer.resume()\n"
        "    return changed\n",
        sync,
    )
    assert sync["_sync_weight_merged"](model, transfer) is False  # type: ignore[operator]
    assert torch.equal(base, before)
    assert engines.calls == ["pause", "publish", "resume"]
    assert len(engines.published) == 1
    assert not engines.sent
    assert versions.of(Version(1)) == 1
    model.merge_adapter()  # anybody else merges as ever
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged
    model.unmerge_adapter()
    transfer.destroy()
    assert "merge_adapter" not in vars(model)


def test_full_weights_go_where_the_engines_take_no_adapter() -> None:
    model, engines, versions = lora_model(), FakeAsyncEngines(), PolicyVersions()
    transfer = RayWeightTransfer(engines, versions)
    assert not transfer.follow(model)
    transfer.pause()
    transfer.send_weights(iter([("lm_head.weight", model.lm_head.weight)]))
    transfer.resume()
    assert engines.calls == ["pause", "send 1", "resume"]
    assert versions.of(Version(0, "1")) == 1
    assert "merge_adapter" not in vars(model)


def test_a_rank_above_the_engines_is_refused_before_training() -> None:
    with pytest.raises(RankAboveEngine, match="its rank is 4, and the engine was built for max_lora_rank=2"):
        RayWeightTransfer(lora_engines(2), PolicyVersions()).follow(lora_model())


def test_engines_that_a_failed_update_left_paused_are_resumed() -> None:
    class Failing(FakeAsyncEngines):
        def send_weights(self, named: Any) -> None:
            raise RuntimeError("half-way")

    engines = Failing()
    transfer = RayWeightTransfer(engines, PolicyVersions())
    transfer.follow(lora_model())
    transfer.pause()
    with pytest.raises(RuntimeError, match="half-way"):
        transfer.send_weights(iter(()))
    transfer.destroy()
    assert engines.calls[-1] == "resume"


def test_ranks_without_engines_are_told_that_there_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they wait, from TRL 1.14 on, for what rank 0 finds out about one."""
    from trlpatch.ray.async_grpo import create

    monkeypatch.setattr(create, "installed_release", lambda: release_of(Sample, Trainer))
    first, other = (create.async_rollouts(engines, len, TEXTS) for engines in (FakeAsyncEngines(), None))
    assert isinstance(first["weight_transfer"], RayWeightTransfer)
    assert other["weight_transfer"] is not None
    assert "rollout_worker" not in other

    class Older:  # TRL 1.6 to 1.8
        def __init__(self, rollout_worker: Any = None) -> None: ...

    monkeypatch.setattr(create, "installed_release", lambda: release_of(Sample, Older))
    assert "weight_transfer" not in create.async_rollouts(None, len, TEXTS)


def test_what_cannot_be_set_up_is_refused() -> None:
    from trlpatch.ray.async_grpo.create import async_rollouts

    for given, expected in (
        ((None, TEXTS), "expected one reward function"),
        (([], TEXTS), "expected one reward function"),
        ((len, None), "train_dataset is None"),
    ):
        with pytest.raises(AsyncNotSupported, match=expected):
            async_rollouts(FakeAsyncEngines(), *given)
    with pytest.raises(AsyncNotSupported, match="one turn"):
        async_rollouts(FakeAsyncEngines(), len, TEXTS, tools=[len])
