"""Spreading prompts over engines: by load, what belongs together on one engine, all of them once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from trlpatch.ray.prompts import as_prompts, cost_of, kind_of, one_each, sequences_of
from trlpatch.ray.spread import Group, Spread, groups


def group(*places: int, sequences: int = 1, cost: int = 10) -> Group:
    return Group(places, sequences, cost)


def test_the_engine_with_the_fewest_tokens_outstanding_gets_the_next_prompt() -> None:
    spread = Spread([group(0, cost=100), group(1), group(2), group(3)], [0, 1], window=8)
    taken = [spread.take() for _ in range(4)]
    assert [one and one[0] for one in taken] == [0, 1, 1, 1]
    assert spread.take() is None


def test_an_engine_gets_no_more_than_it_runs_at_a_time_until_it_has_answered() -> None:
    some = [group(place, sequences=4) for place in range(4)]
    spread = Spread(some, [0, 1], window=4)
    assert [spread.take(), spread.take(), spread.take()] == [(0, some[0]), (1, some[1]), None]
    spread.done(1, some[1])
    assert spread.take() == (1, some[2])
    assert spread.waiting == 1


def test_a_group_that_no_engine_has_room_for_goes_to_one_that_is_idle() -> None:
    large = group(0, sequences=100)
    assert Spread([large], [0], window=8).take() == (0, large)


def test_what_a_lost_engine_had_is_asked_again_elsewhere_first() -> None:
    some = [group(0), group(1), group(2)]
    spread = Spread(some, [0, 1], window=1)
    assert spread.take() == (0, some[0])
    assert spread.take() == (1, some[1])
    spread.again(0, some[0])
    spread.without(0)
    assert spread.take() is None
    spread.done(1, some[1])
    assert spread.take() == (1, some[0])


def test_equal_prompts_side_by_side_stay_together_up_to_an_engines_share() -> None:
    kinds = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    made = groups([1] * 12, [1] * 12, kinds, engines=2, window=64)
    assert [one.places for one in made] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    divided = groups([1] * 8, [1] * 8, ["a"] * 8, engines=2, window=64)
    assert [len(one.places) for one in divided] == [4, 4]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9), st.integers(0, 3)), max_size=60),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_every_prompt_is_in_one_group_and_in_order(
    prompts: list[tuple[int, int, int]], engines: int, window: int
) -> None:
    costs, sequences, kinds = ([prompt[part] for prompt in prompts] for part in range(3))
    made = groups(costs, sequences, kinds, engines, window)
    assert [place for one in made for place in one.places] == list(range(len(prompts)))
    assert sum(one.cost for one in made) == sum(costs)
    spread, answered, running = Spread(made, range(engines), window), Counter[int](), []
    while spread.waiting or running:
        while (taken := spread.take()) is not None:
            running.append(taken)
        engine, one = running.pop(0)
        spread.done(engine, one)
        answered.update(one.places)
    assert answered == Counter(range(len(prompts)))


class Params:
    def __init__(self, n: int, max_tokens: int | None) -> None:
        self.n, self.max_tokens = n, max_tokens


def test_prompts_are_taken_as_vllm_takes_them() -> None:
    assert as_prompts("a") == ["a"]
    assert as_prompts(["a", "b"]) == ["a", "b"]
    assert as_prompts([1, 2]) == [{"prompt_token_ids": [1, 2]}]
    assert as_prompts([[1, 2], [3]]) == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    assert as_prompts({"prompt": "a"}) == [{"prompt": "a"}]
    assert as_prompts([]) == []
    assert one_each(None, 2, "x") == [None, None]
    assert one_each([1, 2], 2, "x") == [1, 2]


def test_the_load_of_a_prompt_is_its_tokens_and_those_of_all_its_completions() -> None:
    ids = {"prompt_token_ids": [1, 2, 3]}
    assert cost_of(ids, Params(4, 100)) == 403
    assert sequences_of(Params(4, 100)) == 4
    assert sequences_of(None) == 1
    assert kind_of(ids, 0) == kind_of({"prompt_token_ids": [1, 2, 3]}, 1)
    assert kind_of({**ids, "multi_modal_data": {}}, 0) != kind_of({**ids, "multi_modal_data": {}}, 1)
