"""Engines that are lost, replaced, given up and waited for, and calls of all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.ray.simulated import Actor, ActorDiedError, Never, Simulated, right, rolled, supervisor_of
from trlpatch.errors import EngineLost, NoEngineLeft
from trlpatch.ray.timeouts import Timeouts


def test_a_place_is_given_up_for_failed_starts_in_a_row_only() -> None:
    def sometimes(cluster: Simulated, index: int, number: int) -> Actor:
        return Actor(cluster, index, replies={"ready": MemoryError("no room")} if number % 3 in (1, 2) else {})

    supervisor, cluster = supervisor_of(1, sometimes)
    for _ in range(3):
        cluster.actors[-1].die(cluster.clock)
        assert rolled(supervisor, 2) == right(2)
    assert len(cluster.actors) == 10


def test_with_no_engine_left_it_is_an_error_that_says_why() -> None:
    def broken(cluster: Simulated, index: int, number: int) -> Actor:
        failing = {"ready": MemoryError("no room for the KV cache")} if number else {}
        return Actor(cluster, index, replies=failing)

    supervisor, cluster = supervisor_of(1, broken)
    cluster.actors[0].die(cluster.clock)
    with pytest.raises(NoEngineLeft, match=r"engine 0 ran out of memory .*no room for the KV cache") as raised:
        rolled(supervisor, 2)
    assert len(cluster.actors) == 1 + 3, "three starts were tried"
    assert isinstance(raised.value.__cause__, MemoryError)
    with pytest.raises(NoEngineLeft):
        rolled(supervisor, 2)
    with pytest.raises(NoEngineLeft):
        supervisor.everywhere("reset_prefix_cache")


def test_with_one_given_up_the_other_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def broken(cluster: Simulated, index: int, number: int) -> Actor:
        return Actor(cluster, index, replies={"ready": Never()} if number > 1 else {})

    supervisor, cluster = supervisor_of(2, broken)
    cluster.actors[1].die(cluster.clock)
    for _ in range(6):
        assert rolled(supervisor, 4) == right(4)
        cluster.clock += 101
    assert "engine 1 was given up after 3 failed starts (engine 1 hung" in supervisor.degraded
    assert caplog.text.count("was given up") == 1


def test_nobody_waits_for_a_replacement_while_another_engine_serves() -> None:
    supervisor, cluster = supervisor_of(
        2,
        lambda cluster, index, number: Actor(cluster, index, starts=5 + 1000 * (number > 1)),
        timeouts=Timeouts(init=1e5, health=20, sync=10, rollout=math.inf, abort=5),
    )
    cluster.actors[1].die(cluster.clock)
    begun = cluster.clock
    assert rolled(supervisor, 4) == right(4)
    assert cluster.clock - begun < 10


def test_a_call_of_all_loses_those_that_fail_or_are_late_and_keeps_the_others_answers() -> None:
    supervisor, cluster = supervisor_of(3)
    cluster.actors[0].replies["publish"] = Never()
    cluster.actors[1].replies["publish"] = EngineLost("half-written")
    assert supervisor.everywhere("publish", 1) == {2: "publish of 2"}
    assert sorted(fault.kind for fault in supervisor.faults) == ["failed", "hung"]
    assert "TRLPATCH_RAY_SYNC_TIMEOUT=20" in str(supervisor.faults[1])
    supervisor.revive()
    assert [place.state for place in supervisor.places] == ["starting", "serving", "serving"]


def test_a_call_of_all_that_is_refused_is_raised_after_all_have_answered() -> None:
    supervisor, cluster = supervisor_of(2)
    cluster.actors[0].replies["publish"] = TypeError("no such module")
    with pytest.raises(TypeError, match="no such module"):
        supervisor.everywhere("publish", 1)
    assert not cluster.killed


def test_a_call_of_all_waits_for_a_replacement_when_nobody_is_left_to_answer() -> None:
    supervisor, cluster = supervisor_of(1)
    cluster.actors[0].die(cluster.clock)
    assert supervisor.everywhere("get_tokenizer") == {0: "get_tokenizer of 0"}
    assert len(cluster.actors) == 2


def test_one_request_goes_to_the_engine_that_owes_least_and_to_another_if_that_is_lost() -> None:
    supervisor, cluster = supervisor_of(2)

    def send(index: int) -> Any:
        return supervisor.places[index].actor.generate.remote((7,))

    supervisor.places[0].load = 50
    assert supervisor.ask(send, cost=10) == [70]
    assert [[name for name, _ in actor.calls].count("generate") for actor in cluster.actors] == [0, 1]
    assert [place.load for place in supervisor.places] == [50, 0]
    cluster.actors[1].die(cluster.clock)
    assert supervisor.ask(send, cost=10) == [70]
    assert [place.load for place in supervisor.places] == [50, 0]


def test_a_loss_that_was_seen_before_costs_no_second_engine() -> None:
    supervisor, cluster = supervisor_of(2)
    supervisor.lost(0, ActorDiedError("dead"))
    assert supervisor.places[0].actor is cluster.actors[2]
    assert not supervisor.degraded
    cluster.actors[2].die(cluster.clock)
    rolled(supervisor, 2)
    assert supervisor.places[0].state == "starting"
    supervisor.lost(0, ActorDiedError("dead, seen by another thread"))
    assert len(cluster.actors) == 4


def test_who_waits_for_a_replacement_goes_on_with_the_others_when_it_never_comes_up() -> None:
    def broken(cluster: Simulated, index: int, number: int) -> Actor:
        return Actor(cluster, index, replies={"ready": Never()} if number > 1 else {})

    supervisor, _ = supervisor_of(2, broken)
    supervisor.lost(1, ActorDiedError("dead"))
    assert "engine 1 was given up" in supervisor.degraded
    assert rolled(supervisor, 4) == right(4)
    with pytest.raises(NoEngineLeft, match="engine 0 hung"):
        supervisor.lost(0, ActorDiedError("dead"))


def test_who_waits_for_a_replacement_does_not_wait_for_weights_that_nobody_has() -> None:
    supervisor, _ = supervisor_of(2, restore=lambda actor, index: False)
    supervisor.lost(1, ActorDiedError("dead"))
    assert "engine 1 waits for the current weights" in supervisor.degraded
    with pytest.raises(NoEngineLeft, match="have to be published"):
        supervisor.lost(0, ActorDiedError("dead"))
