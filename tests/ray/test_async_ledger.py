"""Order of prompts, staleness, what is dropped and asked again, and what a checkpoint says was trained on."""

from __future__ import annotations

import dataclasses
import queue
from types import SimpleNamespace
from typing import Any

import pytest

from trlpatch.errors import AsyncNotSupported, RolloutWorkerFailed
from trlpatch.ray.async_grpo.buffer import RolloutBuffer
from trlpatch.ray.async_grpo.ledger import ATTEMPTS, Ledger
from trlpatch.ray.async_grpo.prompts import Progress, Prompts, Trained
from trlpatch.ray.async_grpo.samples import release_of
from trlpatch.ray.async_grpo.settings import RolloutSettings, check_engines, rollout_settings, warn_of_large_groups
from trlpatch.ray.async_grpo.versions import _KEPT, NEVER_SENT, PolicyVersions
from trlpatch.ray.messages import Version

ROWS = [{"prompt": f"p{i}"} for i in range(3)]


def taken(prompts: Prompts, count: int) -> list[tuple[int, str]]:
    return [(prompt.position, prompt.row["prompt"]) for prompt in (prompts.take() for _ in range(count))]


class Stream:
    """An IterableDataset: no length, no index."""

    def __iter__(self) -> Any:
        return iter(ROWS)


@pytest.mark.parametrize("dataset", [ROWS, Stream()])
def test_prompts_come_in_order_pass_after_pass(dataset: Any) -> None:
    prompts = Prompts(dataset)
    assert taken(prompts, 4) == [(0, "p0"), (1, "p1"), (2, "p2"), (3, "p0")]


@pytest.mark.parametrize("dataset", [ROWS, Stream()])
def test_a_resumed_run_asks_what_was_not_trained_on(dataset: Any) -> None:
    prompts = Prompts(dataset)
    taken(prompts, 2)
    prompts.start(Progress(4, (5, 7)))
    assert taken(prompts, 4) == [(4, "p1"), (6, "p0"), (8, "p2"), (9, "p0")]


@pytest.mark.parametrize("dataset", [[], iter(())])
def test_an_empty_dataset_is_refused(dataset: Any) -> None:
    with pytest.raises(AsyncNotSupported, match="has no rows"):
        Prompts(dataset).take()


def test_what_was_taken_ahead_of_a_step_is_not_trained_on() -> None:
    trained = Trained()
    for position in (0, 0, 1, 1, 2):
        trained.taken(position)
    trained.step_ended(ahead=1)
    assert trained.progress() == Progress(2)
    for position in (2, 4, 4, 3):
        trained.taken(position)
    trained.step_ended(ahead=1)
    assert trained.progress() == Progress(3, (4,))


def test_batches_by_tokens_count_what_was_taken_a_step_ago_but_for_one_sample() -> None:
    trained = Trained()
    for position in (0, 1, 2):
        trained.taken(position)
    trained.step_ended(None)
    assert trained.progress() == Progress(0)
    trained.taken(3)
    trained.step_ended(None)
    assert trained.progress() == Progress(2)


def settings(**changes: Any) -> RolloutSettings:
    return dataclasses.replace(RolloutSettings(2, 1, 4, 1, {}), **changes)


def sample(version: int) -> Any:
    return SimpleNamespace(model_version=version, metrics={})


class Rig:
    def __init__(self, **changes: Any) -> None:
        self.versions = PolicyVersions()
        self.versions.current = 5
        self.trained = Trained()
        self.ledger = Ledger(settings(**changes), Prompts(ROWS), self.trained, self.versions)

    def queued(self, *versions: int) -> list[Any]:
        group = self.ledger.next()
        assert group is not None
        return self.ledger.answered(group, [sample(version) for version in versions])


def test_no_more_prompts_are_under_way_than_can_be_trained_on_in_time() -> None:
    rig = Rig()
    entries = [*rig.queued(5, 5), *rig.queued(5, 5)]
    assert rig.ledger.next() is None
    called = []
    rig.ledger.room = lambda: called.append(True)
    rig.ledger.take(entries[0])
    assert not called
    assert rig.ledger.next() is None
    rig.ledger.take(entries[1])
    assert called
    assert rig.ledger.next() is not None


def test_a_sample_is_taken_up_to_max_staleness_and_says_how_old_it_is() -> None:
    rig = Rig()
    entry, _ = rig.queued(4, 4)
    taken = rig.ledger.take(entry)
    assert taken is entry.sample
    assert taken.metrics["num_steps_off_policy"] == 1.0


def test_engines_that_are_ahead_of_the_trainers_count_give_fresh_samples() -> None:
    entry, _ = (rig := Rig()).queued(6, 6)
    assert rig.ledger.take(entry).metrics["num_steps_off_policy"] == 0.0


def test_a_prompt_whose_samples_are_all_stale_is_asked_again_before_others() -> None:
    rig = Rig()
    for entry in rig.queued(3, 3):
        assert rig.ledger.take(entry) is None
    assert dataclasses.astuple(rig.ledger.totals) == (0, 2, 1, 0)
    again = rig.ledger.next()
    assert again is not None
    assert (again.prompt.position, again.prompt.attempt) == (0, 1)
    following = rig.ledger.next()
    assert following is not None
    assert following.prompt.position == 1


def test_a_prompt_that_was_trained_on_in_part_is_not_asked_again() -> None:
    rig = Rig()
    first, second = rig.queued(4, 4)
    rig.ledger.take(first)
    rig.versions.current = 6
    assert rig.ledger.take(second) is None
    following = rig.ledger.next()
    assert following is not None
    assert following.prompt.position == 1


def test_completions_that_are_stale_before_they_are_scored_are_asked_again() -> None:
    rig = Rig()
    group = rig.ledger.next()
    assert group is not None
    assert rig.ledger.is_stale(3)
    assert not rig.ledger.is_stale(4)
    rig.ledger.outdated(group)
    again = rig.ledger.next()
    assert again is not None
    assert again.prompt.position == 0


def test_a_prompt_that_is_always_stale_is_given_up_and_said(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    for _ in range(ATTEMPTS):
        group = rig.ledger.next()
        assert group is not None
        assert group.prompt.position == 0
        rig.ledger.outdated(group)
    assert rig.ledger.totals.given_up == 1
    assert "prompt 0 is given up" in caplog.text
    assert rig.trained.progress() == Progress(1)
    following = rig.ledger.next()
    assert following is not None
    assert following.prompt.position == 1


def test_the_buffer_gives_what_is_fresh_and_passes_over_the_rest() -> None:
    buffer = RolloutBuffer(lambda entry: None if entry == "stale" else entry)
    for entry in ("stale", "stale", "fresh"):
        buffer.put_nowait(entry)
    assert buffer.get(timeout=0) == "fresh"
    with pytest.raises(queue.Empty):
        buffer.get(timeout=0)


def test_who_waits_at_the_buffer_is_told_that_nothing_will_come() -> None:
    buffer = RolloutBuffer(lambda entry: entry)
    buffer.fail(lambda: RolloutWorkerFailed("it ended"))
    with pytest.raises(RolloutWorkerFailed, match="it ended"):
        buffer.get(timeout=60)
    buffer.restart()
    buffer.put_nowait(1)
    assert buffer.get(timeout=0) == 1


def test_versions_are_counted_as_the_trainer_does() -> None:
    versions = PolicyVersions()
    versions.sent(Version(7))
    versions.current = 1
    versions.sent(Version(7))  # nothing had changed
    assert versions.of(Version(7)) == 2
    assert versions.of(Version(7, "1")) == NEVER_SENT


def test_of_many_versions_the_oldest_is_forgotten_and_not_one_that_was_sent_again() -> None:
    versions = PolicyVersions()
    for number in range(_KEPT):
        versions.sent(Version(number))
    versions.sent(Version(0))
    versions.sent(Version(_KEPT))
    assert versions.of(Version(0)) == 1
    assert versions.of(Version(1)) == NEVER_SENT


def config(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "world_size": 2, "max_staleness": 3,
        "num_generations": 4, "temperature": 0.7, "max_completion_length": 9, "chat_template_kwargs": None,
        "log_completions": False, "num_completions_to_print": None, "weight_sync_steps": 1,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


def test_settings_are_those_of_the_trainers_arguments() -> None:
    found = rollout_settings(config(top_p=0.9, min_p=None, token_budget=100), {"stop": ["x"], "n": 99})
    assert (found.capacity, found.groups, found.micro_batch) == (48, 12, None)
    assert found.sampling == {
        "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0, "temperature": 0.7, "max_tokens": 9, "stop": ["x"],
        "n": 4, "logprobs": 0,
    }  # fmt: skip
    assert rollout_settings(config(max_inflight_tasks=8, queue_maxsize=6)).capacity == 6
    assert rollout_settings(config(max_staleness=0)).capacity == 16
    assert rollout_settings(config(token_budget=-1)).micro_batch == 4
    assert rollout_settings(config(num_generations=99)).groups == 1


def test_groups_that_cannot_be_trained_on_in_time_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    args = config(max_staleness=0, num_generations=16)
    warn_of_large_groups(rollout_settings(args), args)
    assert not caplog.records
    args = config(max_staleness=0, num_generations=17)
    warn_of_large_groups(rollout_settings(args), args)
    assert "at most 16 samples" in caplog.text


def test_log_probabilities_of_another_temperature_are_refused() -> None:
    model = SimpleNamespace(logprobs_mode="raw_logprobs", max_model_len=8)
    info = SimpleNamespace(index=1, vllm_config=SimpleNamespace(model_config=model))
    check_engines([info], config(temperature=1.0))
    with pytest.raises(AsyncNotSupported, match=r"engine 1 has logprobs_mode='raw_logprobs', and temp"):
        check_engines([info], config())


@dataclasses.dataclass
class Sample16:
    """As TRL 1.6's."""

    prompt: Any
    completion: Any
    input_ids: list[int]
    completion_mask: list[int]
    old_log_probs: list[float]
    advantage: float
    model_version: int
    metrics: dict[str, float]


class Trainer16:
    def __init__(self, model: Any, rollout_worker: Any = None) -> None: ...


def test_a_sample_has_the_fields_of_its_release() -> None:
    release = release_of(Sample16, Trainer16)
    assert not release.takes_transfer
    assert not release.drains_metrics
    given: dict[str, Any] = {field.name: field.name for field in dataclasses.fields(Sample16)}
    assert release.build(**given, group_id=3).advantage == "advantage"


def test_a_release_with_other_shapes_is_refused() -> None:
    @dataclasses.dataclass
    class More(Sample16):
        entropy: list[float]

    class Less:
        def __init__(self, model: Any) -> None: ...

    with pytest.raises(AsyncNotSupported, match="wants entropy"):
        release_of(More, Trainer16)
    with pytest.raises(AsyncNotSupported, match="takes no rollout_worker"):
        release_of(Sample16, Less)
