"""Completion lengths of a step: fixed, log-normal with a limit, or as they were measured.

The longest of a batch is what a synchronous step waits for, so each distribution knows the expectation of the maximum
of n beside its moments.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Protocol

_GRID = 2000
"""Points of the numeric integrals."""


class Lengths(Protocol):
    """Lengths of completions in tokens, independent of each other."""

    @property
    def mean(self) -> float:
        """E[L]."""

    @property
    def mean_square(self) -> float:
        """E[L^2]."""

    def longest_of(self, n: int) -> float:
        """Return E[max of n]."""

    def below(self, tokens: float) -> float:
        """Return P(L <= tokens)."""

    def sample(self, generator: random.Random) -> int:
        """Return a length, at least 1."""


@dataclass(frozen=True)
class Fixed:
    """Every completion has `tokens` tokens, as with `ignore_eos`."""

    tokens: int

    @property
    def mean(self) -> float:
        """E[L]."""
        return float(self.tokens)

    @property
    def mean_square(self) -> float:
        """E[L^2]."""
        return float(self.tokens) ** 2

    def longest_of(self, n: int) -> float:
        """Return E[max of n]."""
        return float(self.tokens)

    def below(self, tokens: float) -> float:
        """Return P(L <= tokens)."""
        return float(tokens >= self.tokens)

    def sample(self, generator: random.Random) -> int:
        """Return `tokens`."""
        return self.tokens


@dataclass(frozen=True)
class LogNormal:
    """exp(N(log median, sigma^2)), cut at `limit` (`max_completion_length`): a long tail with a mass at the limit.

    sigma 0.5 is mild (the longest of 64 is 3.2 times the median), 1.0 a reasoning model's (10 times).
    """

    median: float
    sigma: float
    limit: int

    @cached_property
    def mean(self) -> float:
        """E[min(L, limit)]."""
        return self._moment(1)

    @cached_property
    def mean_square(self) -> float:
        """E[min(L, limit)^2]."""
        return self._moment(2)

    def longest_of(self, n: int) -> float:
        """Return E[max of n], by integrating 1 - F^n."""
        return _longest_lognormal(self, n)

    def sample(self, generator: random.Random) -> int:
        """Return a length, at least 1."""
        return max(1, min(self.limit, round(generator.lognormvariate(math.log(self.median), self.sigma))))

    def below(self, tokens: float) -> float:
        """Return P(L <= tokens)."""
        if tokens <= 0:
            return 0.0
        if tokens >= self.limit:
            return 1.0
        return self._logarithm.cdf(math.log(tokens))

    @cached_property
    def _logarithm(self) -> NormalDist:
        return NormalDist(math.log(self.median), self.sigma)

    def _moment(self, power: int) -> float:
        mu, unit = math.log(self.median), NormalDist()
        cut = (math.log(self.limit) - mu) / self.sigma
        inside = math.exp(power * mu + (power * self.sigma) ** 2 / 2) * unit.cdf(cut - power * self.sigma)
        return inside + float(self.limit) ** power * (1 - unit.cdf(cut))


@lru_cache(maxsize=4096)
def _longest_lognormal(lengths: LogNormal, n: int) -> float:
    tail = [1 - below**n for below in _on_grid(lengths)]
    return lengths.limit / _GRID * (sum(tail) - (tail[0] + tail[-1]) / 2)


@lru_cache(maxsize=64)
def _on_grid(lengths: LogNormal) -> list[float]:
    return [lengths.below(at * lengths.limit / _GRID) for at in range(_GRID)] + [1.0]


@dataclass(frozen=True)
class Measured:
    """Lengths that were seen, drawn from with replacement."""

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Measured:
        """Make it; order does not matter.

        Raises:
            ValueError: there is none, or one is below 1.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: expected at least one, all of 1 token or more; found {list(lengths)[:5]}")
        return cls(tuple(sorted(lengths)))

    @cached_property
    def mean(self) -> float:
        """E[L]."""
        return sum(self.lengths) / len(self.lengths)

    @cached_property
    def mean_square(self) -> float:
        """E[L^2]."""
        return sum(length**2 for length in self.lengths) / len(self.lengths)

    def longest_of(self, n: int) -> float:
        """Return E[max of n], exactly: P(max <= the i-th of m) is (i / m)^n."""
        below, expected = 0.0, 0.0
        for value in self._different:
            reached = self.below(value) ** n
            expected += value * (reached - below)
            below = reached
        return expected

    def below(self, tokens: float) -> float:
        """Return P(L <= tokens)."""
        return bisect.bisect_right(self.lengths, tokens) / len(self.lengths)

    def sample(self, generator: random.Random) -> int:
        """Return one of them."""
        return generator.choice(self.lengths)

    @cached_property
    def _different(self) -> list[int]:
        return sorted(set(self.lengths))
