"""Prompts in the order of the dataset: which comes next, which is asked again, and which were trained on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trlpatch.errors import AsyncNotSupported


@dataclass(frozen=True)
class Prompt:
    """One row of the dataset in one of its passes."""

    position: int
    """Counted from the start of the first run, over all passes: also the `group_id` of its samples."""
    row: Mapping[str, Any]
    attempt: int = 0
    """How many times all of its samples were dropped."""


@dataclass(frozen=True)
class Progress:
    """How far training has come in the prompts; what a checkpoint keeps."""

    position: int = 0
    """Every prompt before this one was trained on, or given up."""
    beyond: tuple[int, ...] = ()
    """Those after it that were, too: a short completion overtakes a long one."""


class Prompts:
    """An endless iterator over the dataset, in its order, pass after pass.

    As TRL's own worker, no shuffling: shuffle the dataset.
    """

    def __init__(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        """Start at the first prompt."""
        self._dataset: Any = dataset
        self._indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        self._again: deque[Prompt] = deque()
        self.start(Progress())

    def start(self, done: Progress) -> None:
        """Begin anew with the first prompt that `done` does not name; forget what was to be asked again."""
        self._again.clear()
        self._next = done.position
        self._skip = set(done.beyond)
        self._rows: Iterator[Mapping[str, Any]] | None = None

    def take(self) -> Prompt:
        """Give the prompt to ask next: one that is to be asked again before any other.

        Raises:
            AsyncNotSupported: the dataset is empty.
        """
        if self._again:
            return self._again.popleft()
        while self._next in self._skip:
            self._skip.discard(self._next)
            self._next += 1
            if self._rows is not None:
                self._follow()
        prompt = Prompt(self._next, self._row())
        self._next += 1
        return prompt

    def ask_again(self, prompt: Prompt) -> None:
        """Take this prompt back: its samples were dropped."""
        self._again.append(Prompt(prompt.position, prompt.row, prompt.attempt + 1))

    def _row(self) -> Mapping[str, Any]:
        if self._indexed:
            if not len(self._dataset):
                raise _empty()
            row: Mapping[str, Any] = self._dataset[self._next % len(self._dataset)]
            return row
        if self._rows is None:  # a stream: what comes before is read and thrown away
            self._rows = self._passes()
            next(itertools.islice(self._rows, self._next, self._next), None)
        return self._follow()

    def _follow(self) -> Mapping[str, Any]:
        assert self._rows is not None
        return next(self._rows)

    def _passes(self) -> Iterator[Mapping[str, Any]]:
        while True:
            rows = 0
            for row in self._dataset:
                rows += 1
                yield row
            if not rows:
                raise _empty()


def _empty() -> AsyncNotSupported:
    return AsyncNotSupported("rollouts of AsyncGRPOTrainer on Ray engines: `train_dataset` has no rows")


class Trained:
    """Which prompts the trainer has trained on, as far as that is sure.

    The trainer takes samples ahead: accelerate's DataLoaderDispatcher fetches one micro-batch before it gives out the
    one before. Samples that were taken and not trained on when a checkpoint was written are asked again on resume.
    """

    def __init__(self, done: Progress | None = None) -> None:
        """Begin with what an earlier run has trained on."""
        done = done or Progress()
        self._first = done.position
        self._beyond = set(done.beyond)
        self._waiting: deque[int] = deque()
        """Positions of samples that were taken, in order, and may not have been trained on."""
        self._sure = self._taken = 0
        self._taken_before = 0
        """When the step before ended."""

    def taken(self, position: int) -> None:
        """The trainer has taken a sample of this prompt."""
        self._taken += 1
        self._waiting.append(position)

    def given_up(self, position: int) -> None:
        """This prompt is not asked any more."""
        self._done(position)

    def step_ended(self, ahead: int | None) -> None:
        """An optimizer step has ended; `ahead` samples were taken for the next one.

        None when that number is not known (batches by tokens): what was taken when the step before ended was trained
        on by now, but for one sample, which TokenBudgetBatcher has in hand when it closes a batch.
        """
        sure = self._taken_before - 1 if ahead is None else self._taken - ahead
        self._taken_before = self._taken
        while self._sure < sure:
            self._sure += 1
            self._done(self._waiting.popleft())

    def progress(self) -> Progress:
        """What a checkpoint keeps."""
        return Progress(self._first, tuple(sorted(self._beyond)))

    def _done(self, position: int) -> None:
        if position < self._first:
            return
        self._beyond.add(position)
        while self._first in self._beyond:
            self._beyond.discard(self._first)
            self._first += 1
