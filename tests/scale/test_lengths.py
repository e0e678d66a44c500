"""Distributions of completion lengths: their moments and the longest of n, against sums and samples."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trlpatch.errors import InvalidSetting
from trlpatch.scale.lengths import Fixed, Lengths, LogNormal, Measured
from trlpatch.scale.setting import lengths_of

SEARCH = settings(deadline=None, derandomize=True)
MANY = 20_000


@pytest.mark.parametrize(
    "lengths",
    [Fixed(7), LogNormal(200, 0.5, 4096), LogNormal(400, 1.0, 1024), Measured.of([3, 1, 50, 50])],
    ids=["fixed", "mild", "cut", "measured"],
)
def test_moments_and_longest_are_those_of_samples(lengths: Lengths) -> None:
    generator = random.Random(1)
    drawn = [lengths.sample(generator) for _ in range(MANY)]
    assert min(drawn) >= 1
    assert fmean(drawn) == pytest.approx(lengths.mean, rel=0.02)
    assert fmean(length**2 for length in drawn) == pytest.approx(lengths.mean_square, rel=0.05)
    for tokens in (2, 100, 500):
        assert fmean(length <= tokens for length in drawn) == pytest.approx(lengths.below(tokens), abs=0.02)
    longest = [max(drawn[at : at + 8]) for at in range(0, MANY, 8)]
    assert fmean(longest) == pytest.approx(lengths.longest_of(8), rel=0.03)


@SEARCH
@given(st.lists(st.integers(1, 500), min_size=1, max_size=30))
def test_longest_of_measured_ones_goes_from_the_mean_to_the_longest(seen: list[int]) -> None:
    lengths = Measured.of(seen)
    assert lengths.longest_of(1) == pytest.approx(lengths.mean)
    assert lengths.longest_of(10_000) == pytest.approx(max(seen), rel=1e-3)


@settings(SEARCH, max_examples=30)
@given(st.floats(1, 2000), st.floats(0.05, 2), st.integers(1, 8192))
def test_the_longest_grows_with_n_up_to_the_limit(median: float, sigma: float, limit: int) -> None:
    lengths = LogNormal(median, sigma, limit)
    # A numeric integral: its grid is a 2000th of the limit.
    assert lengths.longest_of(1) == pytest.approx(lengths.mean, abs=limit / 1000)
    found = [lengths.longest_of(n) for n in (1, 2, 8, 64, 4096)]
    assert found == sorted(found)
    assert found[-1] <= limit


def test_lengths_are_read_from_json() -> None:
    assert lengths_of(256) == Fixed(256)
    assert lengths_of([3, 1]) == Measured((1, 3))
    assert lengths_of({"median": 400, "sigma": 1.0, "limit": 4096}) == LogNormal(400, 1.0, 4096)


@pytest.mark.parametrize("wrong", [0, -1, [], [0], {"median": 1}, {"median": 1, "sigma": -1, "limit": 3}, "x"])
def test_what_is_no_length_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidSetting, match="lengths: expected"):
        lengths_of(wrong)  # type: ignore[arg-type]
