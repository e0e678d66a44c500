"""The simulated engine against one that decodes token by token, and against the closed form of one engine."""

from __future__ import annotations

import math
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trlpatch.scale.costs import EngineCosts
from trlpatch.scale.simulated_engine import Request, SimulatedEngine

SEARCH = settings(deadline=None, derandomize=True, max_examples=60)
COSTS = EngineCosts(base=5e-3, each=3e-5, seen=2e-8, prefill=1e-5)
FREE = EngineCosts(base=1.0, each=0.0, seen=0.0, prefill=0.0)

batches = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=25)


def token_by_token(costs: EngineCosts, slots: int, requests: list[tuple[int, int]]) -> list[tuple[float, int]]:
    """Decode one token after another: all running sequences get one in each step."""
    waiting = deque(enumerate(requests))
    running: dict[int, list[int]] = {}
    clock, done = 0.0, []
    while waiting or running:
        while waiting and len(running) < slots:
            key, (tokens, prompt) = waiting.popleft()
            running[key] = [tokens, prompt]
            clock += costs.prefill * prompt
        # Reading the cache is counted from the middle of a step, as the integral over the step has it.
        context = sum(seen for _, seen in running.values())
        clock += costs.step(len(running), context + len(running) / 2)
        for key in list(running):
            running[key][0] -= 1
            running[key][1] += 1
            if not running[key][0]:
                done.append((clock, key))
                del running[key]
    return done


def simulated(costs: EngineCosts, slots: int, requests: list[tuple[int, int]]) -> list[tuple[float, int]]:
    engine = SimulatedEngine(costs, slots)
    for key, (tokens, prompt) in enumerate(requests):
        engine.submit(0.0, Request(key, prompt, tokens, prompt))
    return [(when, int(str(request.key))) for when, request in engine.drain()]


@SEARCH
@given(batches, st.integers(1, 30))
def test_jumping_from_end_to_end_is_decoding_token_by_token(requests: list[tuple[int, int]], slots: int) -> None:
    exact, found = token_by_token(COSTS, slots, requests), simulated(COSTS, slots, requests)
    assert sorted(key for _, key in found) == sorted(key for _, key in exact)
    assert [when for when, _ in found] == pytest.approx([when for when, _ in exact], rel=1e-9)


@SEARCH
@given(batches)
def test_the_last_end_of_a_batch_that_fits_is_the_closed_form(requests: list[tuple[int, int]]) -> None:
    tokens = [tokens for tokens, _ in requests]
    context = sum(length * prompt + length**2 / 2 for length, prompt in requests)
    prompts = sum(prompt for _, prompt in requests)
    expected = COSTS.base * max(tokens) + COSTS.each * sum(tokens) + COSTS.seen * context + COSTS.prefill * prompts
    assert simulated(COSTS, len(requests), requests)[-1][0] == pytest.approx(expected, rel=1e-9)


@SEARCH
@given(batches, st.lists(st.floats(0, 0.5), min_size=1, max_size=20))
def test_stopping_to_look_changes_nothing(requests: list[tuple[int, int]], looks: list[float]) -> None:
    engine = SimulatedEngine(COSTS, 5)
    for key, (tokens, prompt) in enumerate(requests):
        engine.submit(0.0, Request(key, prompt, tokens, prompt))
    seen, now = [], 0.0
    for look in looks:
        now += look
        seen += engine.advance(now)
    seen += engine.drain()
    assert [when for when, _ in seen] == pytest.approx([when for when, _ in simulated(COSTS, 5, requests)], rel=1e-6)


def test_a_pause_moves_every_end_and_nothing_else() -> None:
    engine = SimulatedEngine(FREE, 2)
    for tokens in (3, 5):
        engine.submit(0.0, Request(tokens, 0, tokens, 0))
    assert engine.advance(2.0) == []
    engine.pause(2.0, 10.0)
    assert [when for when, _ in engine.drain()] == [13.0, 15.0]
    assert engine.busy == 5.0


def test_what_does_not_fit_waits_for_a_slot() -> None:
    assert simulated(FREE, 1, [(3, 0), (2, 0), (1, 0)]) == [(3.0, 0), (5.0, 1), (6.0, 2)]
    assert simulated(FREE, 2, [(3, 0), (2, 0), (1, 0)]) == [(2.0, 1), (3.0, 0), (3.0, 2)]


def test_an_engine_with_nothing_to_do_has_no_next_end() -> None:
    engine = SimulatedEngine(COSTS, 1)
    assert engine.next_end() == math.inf
    assert engine.advance(5.0) == []
    engine.submit(7.0, Request(0, 0, 1, 0))
    assert engine.next_end() == pytest.approx(7.0 + COSTS.step(1, 0.5))
