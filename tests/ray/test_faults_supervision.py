"""What becomes of a rollout when engines die, hang or are slow: every prompt answered once, in order, or an error."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.ray.simulated import (
    FAST,
    NEVER,
    Actor,
    ActorDiedError,
    Make,
    Never,
    Simulated,
    dealt,
    right,
    rolled,
    supervisor_of,
)
from trlpatch.errors import EngineHung, EngineLost, NoEngineLeft, RolloutFailed, WrongVersion
from trlpatch.ray.faults import Fault
from trlpatch.ray.messages import EngineHealth, Version
from trlpatch.ray.spread import Group
from trlpatch.ray.supervision import Supervisor
from trlpatch.ray.timeouts import Timeouts


def test_two_engines_answer_in_order() -> None:
    def uneven(cluster: Simulated, index: int, number: int) -> Actor:
        return Actor(cluster, index, seconds=1.0 + index)

    supervisor, cluster = supervisor_of(2, uneven)
    assert rolled(supervisor, 7, size=2, room=1) == right(7)
    assert not cluster.killed
    assert not supervisor.degraded


def test_prompts_of_an_engine_that_dies_are_asked_of_the_other_one(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=10))
    cluster.actors[0].die(cluster.clock + 3)
    assert rolled(supervisor, 8, size=2) == right(8)
    assert len(cluster.actors) == 3, "its replacement was begun"
    assert [fault.kind for fault in supervisor.faults] == ["killed"]
    assert "1 of 2 rollout engines serve: engine 0 is being replaced" in caplog.text


def test_a_replacement_is_given_the_weights_before_it_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    restored: list[tuple[Actor, float]] = []

    def restore(actor: Actor, index: int) -> bool:
        restored.append((actor, actor.cluster.clock))
        assert not [name for name, _ in actor.calls if name == "generate"]
        return True

    supervisor, cluster = supervisor_of(1, restore=restore)
    assert not restored, "the first engines have the checkpoint"
    cluster.actors[0].die(cluster.clock + 0.5)
    assert rolled(supervisor, 4) == right(4)
    assert [(actor is cluster.actors[1]) for actor, _ in restored] == [True]
    assert "all 1 rollout engines serve again" in caplog.text


def test_a_replacement_without_weights_waits_for_the_next_publication() -> None:
    supervisor, cluster = supervisor_of(2, restore=lambda actor, index: False)
    cluster.actors[0].die(cluster.clock)
    assert rolled(supervisor, 4) == right(4)
    cluster.clock += 60
    assert rolled(supervisor, 4) == right(4)
    assert "engine 0 waits for the current weights" in supervisor.degraded
    assert supervisor.publish("update", 7) == {0: "update of 0", 1: "update of 1"}
    assert not supervisor.degraded
    assert rolled(supervisor, 4) == right(4)
    assert [name for name, _ in cluster.actors[2].calls].count("generate") == 2

    cluster.actors[1].die(cluster.clock)
    cluster.actors[2].die(cluster.clock)
    with pytest.raises(NoEngineLeft, match="weights have to be published before the next rollout"):
        rolled(supervisor, 4)


def test_a_prompt_that_ends_two_engines_ends_the_rollout_with_both_causes() -> None:
    def poisoned(cluster: Simulated, index: int, number: int) -> Actor:
        def generate(places: tuple[int, ...]) -> Any:
            if 3 in places:
                return ActorDiedError(f"actor {number} died of prompt 3")
            return [10 * place for place in places]

        return Actor(cluster, index, replies={"generate": generate})

    supervisor, cluster = supervisor_of(3, poisoned)
    with pytest.raises(RolloutFailed, match=r"1 of the prompts .* number 3\) were given to two") as raised:
        rolled(supervisor, 6, room=1)
    assert [str(raised.value.first)[:7], str(raised.value.second)[:7]] == ["actor 0", "actor 1"]
    assert raised.value.__cause__ is raised.value.second
    assert len(cluster.killed) == 2, "the third engine was not given it"


def test_an_error_of_the_request_is_raised_at_once_and_costs_no_engine() -> None:
    def refuses(places: tuple[int, ...]) -> Any:
        return ValueError("prompt is longer than max_model_len") if 1 in places else [10 * place for place in places]

    supervisor, cluster = supervisor_of(
        2, lambda cluster, index, number: Actor(cluster, index, replies={"generate": refuses})
    )
    with pytest.raises(ValueError, match="longer than max_model_len"):
        rolled(supervisor, 4)
    assert not cluster.killed
    assert not supervisor._unsettled
    assert rolled(supervisor, 1) == [0]


def test_an_engine_whose_thread_stands_still_is_killed_after_the_health_timeout() -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=3))
    hung = cluster.actors[1]
    hung.hangs_at = cluster.clock + 1
    begun = cluster.clock
    assert rolled(supervisor, 4) == right(4)
    assert cluster.killed == [hung]
    assert supervisor.faults[0].kind == "hung"
    assert isinstance(supervisor.faults[0].error, EngineHung)
    assert "TRLPATCH_RAY_HEALTH_TIMEOUT=40" in str(supervisor.faults[0])
    assert 20 < cluster.clock - begun < 40


def test_that_an_engine_hung_says_more_than_that_it_was_killed() -> None:
    def hangs(cluster: Simulated, index: int, number: int) -> Actor:
        return Actor(cluster, index, seconds=3, hangs_at=6)

    supervisor, _ = supervisor_of(2, hangs)
    with pytest.raises(RolloutFailed) as raised:
        rolled(supervisor, 1)
    assert [type(raised.value.first), type(raised.value.second)] == [EngineHung, EngineHung]


def test_an_actor_that_answers_nothing_at_all_is_killed_too() -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=3))
    hung = cluster.actors[0]
    hung.hangs_at, hung.deaf = cluster.clock + 1, True
    assert rolled(supervisor, 4) == right(4)
    assert cluster.killed == [hung]
    assert "not even `health`" in str(supervisor.faults[0])


@pytest.mark.parametrize("deaf", [True, False])
def test_a_lost_engine_is_not_waited_for_where_ray_says_nothing_of_its_end(deaf: bool) -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=3))
    cluster.fall_silent()
    cluster.actors[1].hangs_at, cluster.actors[1].deaf = cluster.clock, deaf
    begun = cluster.clock
    assert rolled(supervisor, 8, size=2) == right(8)
    assert cluster.killed == [cluster.actors[1]]
    assert cluster.clock - begun < 3 * FAST.health


def test_answers_that_a_lost_engine_has_given_count() -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=3))
    cluster.fall_silent()
    asked: list[tuple[int, ...]] = []

    def ask(index: int, group: Group) -> Any:
        asked.append(group.places)
        return supervisor.places[index].actor.generate.remote(group.places)

    wait, first = cluster.wait, True

    def lost_after(refs: Any, timeout: float) -> Any:
        nonlocal first
        found = wait(refs, timeout)
        if first and found and found[0].method == "generate":
            first = False
            place = supervisor.places[1]
            supervisor.lose(place, place.actor, Fault(1, "hung", EngineHung("seen by another thread")))
            return found[:1]  # of engine 0: those of engine 1 are there, and not looked at yet
        return found

    cluster.wait = lost_after  # type: ignore[method-assign]
    answers = supervisor.rollout(dealt(4), ask)
    assert [answer for _, answer in answers] == [[0], [10], [20], [30]]
    assert len(asked) == 4


def test_a_rollout_whose_engines_were_shut_down_ends(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=3))
    cluster.fall_silent()
    sent = 0

    def ask(index: int, group: Group) -> Any:
        nonlocal sent
        sent += 1
        if sent == 3:
            supervisor.shutdown()
        return supervisor.places[index].actor.generate.remote(group.places)

    for actor in cluster.actors:
        actor.hangs_at = cluster.clock
    with pytest.raises(NoEngineLeft, match="they were shut down"):
        supervisor.rollout(dealt(6), ask)
    assert not caplog.text, "that nothing serves is what was asked for"


def test_an_engine_that_was_killed_is_not_waited_for_after_an_interrupt() -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=50))
    cluster.fall_silent()
    cluster.actors[1].hangs_at = cluster.clock
    cluster.interrupt_at = cluster.clock + FAST.health + 0.5 * supervisor.slice
    with pytest.raises(KeyboardInterrupt):
        rolled(supervisor, 4)
    place = supervisor.places[1]
    supervisor.lose(place, cluster.actors[1], Fault(1, "hung", EngineHung("seen by another thread")))
    begun = cluster.clock
    supervisor.settle()
    assert cluster.clock - begun < 1
    assert not supervisor._unsettled


def test_an_engine_that_knows_nothing_of_what_it_was_asked_is_replaced() -> None:
    idle = EngineHealth(1, "running", 0, 0, Version(), 1, 0.0, 1)

    def forgetful(cluster: Simulated, index: int, number: int) -> Actor:
        replies = {"health": idle, "generate": Never()} if number == 1 else {}
        return Actor(cluster, index, seconds=3, replies=replies)

    supervisor, cluster = supervisor_of(2, forgetful)
    cluster.ends = cluster.clock + 1000
    begun = cluster.clock
    assert rolled(supervisor, 8, size=2) == right(8)
    assert cluster.killed == [cluster.actors[1]]
    assert "it held no request" in str(supervisor.faults[0])
    assert FAST.health < cluster.clock - begun < 3 * FAST.health


def test_a_slow_engine_that_steps_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, cluster = supervisor_of(
        2, lambda cluster, index, number: Actor(cluster, index, seconds=1 + 500 * index)
    )
    assert rolled(supervisor, 4) == right(4)
    assert not cluster.killed
    assert "rollout engine 1 is slow" in caplog.text


def test_the_rollout_timeout_ends_also_an_engine_that_steps() -> None:
    timeouts = Timeouts(init=100, health=20, sync=10, rollout=50, abort=5)
    supervisor, cluster = supervisor_of(
        2, lambda cluster, index, number: Actor(cluster, index, seconds=1 + 500 * (number == 1)), timeouts=timeouts
    )
    assert rolled(supervisor, 4) == right(4)
    assert cluster.killed == [cluster.actors[1]]
    assert "TRLPATCH_RAY_ROLLOUT_TIMEOUT=100" in str(supervisor.faults[0])


@pytest.mark.parametrize("state", ["paused", "asleep"])
def test_an_engine_that_is_paused_and_never_resumed_is_found(state: str) -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=3))
    cluster.actors[1].hangs_at, cluster.actors[1].state = cluster.clock, state
    begun = cluster.clock
    assert rolled(supervisor, 4) == right(4)
    assert cluster.clock - begun > FAST.health + FAST.sync
    assert state in str(supervisor.faults[0])


def test_an_engine_that_another_thread_has_exchanged_is_not_asked_and_nobody_waits() -> None:
    supervisor, cluster = supervisor_of(1, timeouts=Timeouts(init=100, health=600))
    (place,) = supervisor.places
    revive = supervisor.revive

    def exchanged(*, wait: bool = False) -> Any:
        serving = revive(wait=wait)
        supervisor.revive = revive  # type: ignore[method-assign]
        supervisor.lose(place, place.actor, Fault(0, "hung", EngineHung("seen by another thread")))
        assert place.state == "starting"
        return serving

    supervisor.revive = exchanged  # type: ignore[method-assign]
    begun = cluster.clock
    assert rolled(supervisor, 4) == right(4)
    assert "generate" not in [name for name, _ in cluster.actors[0].calls]
    assert [name for name, _ in cluster.actors[1].calls][:2] == ["ready", "generate"]
    assert cluster.clock - begun < 10


def test_an_engine_that_calls_itself_lost_is_replaced() -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=30))
    lost = EngineHealth(1, "lost", 0, 1, Version(), 1, 0.0, 1, reason="half-written")
    cluster.actors[1].replies["health"] = lost
    assert rolled(supervisor, 4) == right(4)
    assert "half-written" in str(supervisor.faults[0])
    assert isinstance(supervisor.faults[0].error, EngineLost)


def test_an_engine_of_another_version_is_given_the_current_one_and_not_killed() -> None:
    held = {0: 1, 1: 0}

    def stale(cluster: Simulated, index: int, number: int) -> Actor:
        def generate(places: tuple[int, ...]) -> Any:
            return [10 * place for place in places] if held[index] else WrongVersion("it holds adapter 0")

        return Actor(cluster, index, replies={"generate": generate})

    def restore(actor: Actor, index: int) -> bool:
        held[index] = 1
        return True

    supervisor, cluster = supervisor_of(2, stale, restore=restore)
    assert rolled(supervisor, 6) == right(6)
    assert held == {0: 1, 1: 1}
    assert not cluster.killed


def test_a_version_that_no_engine_has_is_an_error_with_both_causes() -> None:
    supervisor, _ = supervisor_of(
        2, lambda cluster, index, number: Actor(cluster, index, replies={"generate": WrongVersion("holds 3, not 4")})
    )
    with pytest.raises(RolloutFailed, match="had other weights than were asked for"):
        rolled(supervisor, 2)


def test_an_interrupt_aborts_what_is_in_flight_and_the_next_rollout_is_right() -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=50))
    cluster.interrupt_at = cluster.clock + 7
    with pytest.raises(KeyboardInterrupt):
        rolled(supervisor, 4)
    assert all("abort" in [name for name, _ in actor.calls] for actor in cluster.actors)
    assert not supervisor._unsettled
    assert not cluster.killed
    assert rolled(supervisor, 4) == right(4)


def test_an_engine_that_cannot_abort_is_replaced_and_a_second_interrupt_forgets_nothing() -> None:
    supervisor, cluster = supervisor_of(2, lambda cluster, index, number: Actor(cluster, index, seconds=50))
    cluster.actors[0].hangs_at = cluster.clock + 1
    cluster.interrupt_at = cluster.clock + 7
    real = supervisor.settle

    def interrupted_again() -> None:
        if supervisor._unsettled:
            supervisor.settle = real  # type: ignore[method-assign]
            raise KeyboardInterrupt

    supervisor.settle = interrupted_again  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        rolled(supervisor, 4)
    assert len(supervisor._unsettled) == 4
    assert rolled(supervisor, 4) == right(4)
    assert cluster.killed == [cluster.actors[0]]
    assert "TRLPATCH_RAY_ABORT_TIMEOUT" in str(supervisor.faults[0])


def test_a_request_that_somebody_else_has_aborted_is_asked_again_once() -> None:
    from concurrent.futures import CancelledError

    counts: dict[tuple[int, ...], int] = {}

    def aborted(often: int) -> Make:
        def generate(places: tuple[int, ...]) -> Any:
            counts[places] = counts.get(places, 0) + 1
            return CancelledError() if counts[places] <= often else [10 * place for place in places]

        return lambda cluster, index, number: Actor(cluster, index, replies={"generate": generate})

    supervisor, cluster = supervisor_of(2, aborted(1))
    assert rolled(supervisor, 4) == right(4)
    counts.clear()
    supervisor, cluster = supervisor_of(2, aborted(2))
    with pytest.raises(CancelledError):
        rolled(supervisor, 4)
    assert not cluster.killed


@pytest.mark.parametrize("seed", range(30))
def test_whatever_dies_or_hangs_no_prompt_is_lost_or_answered_twice(seed: int) -> None:
    dice = random.Random(seed)

    def mortal(cluster: Simulated, index: int, number: int) -> Actor:
        dies, hangs = (cluster.clock + dice.expovariate(1 / 60) if dice.random() < 0.4 else NEVER for _ in range(2))
        return Actor(
            cluster, index, seconds=dice.uniform(0.5, 9), dies_at=dies, hangs_at=hangs, deaf=dice.random() < 0.5
        )

    cluster = Simulated(lambda cluster, index, number: Actor(cluster, index))
    supervisor = Supervisor(cluster.build, 3, FAST, cluster=cluster)
    supervisor.start()
    cluster.make = mortal
    for actor in cluster.actors:
        actor.dies_at = cluster.clock + dice.expovariate(1 / 30)
    outcomes = {"right": 0, "failed": 0}
    for _ in range(40):
        count = dice.randint(1, 40)
        try:
            assert rolled(supervisor, count, size=dice.randint(1, 5), room=dice.choice([1, 4, 1000])) == right(count)
            outcomes["right"] += 1
        except RolloutFailed:
            outcomes["failed"] += 1
        except NoEngineLeft:
            break
        assert not supervisor._unsettled
        cluster.clock += dice.uniform(0, 30)
    assert outcomes["right"]
