"""Every prompt that is under way: how many may be, which samples are stale, and what comes in their place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trlpatch.log import logger
from trlpatch.ray.async_grpo.prompts import Prompt, Prompts, Trained
from trlpatch.ray.async_grpo.settings import RolloutSettings
from trlpatch.ray.async_grpo.versions import PolicyVersions

ATTEMPTS = 3
"""How often a prompt is asked whose samples are all too old when their turn comes."""


@dataclass(eq=False)
class Asked:
    """A prompt whose samples are not all taken or dropped yet."""

    prompt: Prompt
    waiting: int = 0
    """Samples in the buffer."""
    taken: int = 0


@dataclass(frozen=True)
class Entry:
    """One sample in the buffer."""

    sample: Any
    group: Asked


@dataclass
class Totals:
    """What became of samples since the run began."""

    taken: int = 0
    dropped: int = 0
    """Too old when their turn came."""
    asked_again: int = 0
    """Prompts that were asked once more in the place of dropped samples."""
    given_up: int = 0
    """Prompts that were dropped `ATTEMPTS` times."""


class Ledger:
    """Used by the worker's thread (asking) and the trainer's (taking)."""

    def __init__(
        self, settings: RolloutSettings, prompts: Prompts, trained: Trained, versions: PolicyVersions
    ) -> None:
        """Nothing is under way."""
        self.settings = settings
        self.totals = Totals()
        self.room: Callable[[], None] = lambda: None
        """Called when another prompt may be asked."""
        self._prompts = prompts
        self._versions = versions
        self._trained = trained
        self._groups: set[Asked] = set()
        self._lock = threading.RLock()

    # The worker's thread.

    def next(self) -> Asked | None:
        """Give a prompt to ask, counted as under way; None while enough are."""
        with self._lock:
            if len(self._groups) >= self.settings.groups:
                return None
            group = Asked(self._prompts.take())
            self._groups.add(group)
            return group

    def is_stale(self, model_version: int) -> bool:
        """Would the trainer drop a sample of this version now?"""
        return self._versions.current - model_version > self.settings.max_staleness

    def answered(self, group: Asked, samples: Sequence[Any]) -> list[Entry]:
        """The samples of a prompt, as entries of the buffer."""
        with self._lock:
            group.waiting = len(samples)
            if not samples:  # nothing in it to train on
                self._trained.given_up(group.prompt.position)
                self._close(group)
            return [Entry(sample, group) for sample in samples]

    def outdated(self, group: Asked) -> None:
        """All completions of a prompt are too old before they were scored."""
        with self._lock:
            self.totals.dropped += self.settings.num_generations
            self._replenish(group)

    @property
    def under_way(self) -> int:
        """Prompts that are asked, scored or wait to be trained on."""
        return len(self._groups)

    # The trainer's thread.

    def take(self, entry: Entry) -> Any | None:
        """The sample, with its staleness as metric `num_steps_off_policy`; None where it is too old."""
        group, sample = entry.group, entry.sample
        with self._lock:
            group.waiting -= 1
            stale = self.is_stale(sample.model_version)
            if stale:
                self.totals.dropped += 1
            else:
                group.taken += 1
                self.totals.taken += 1
                self._trained.taken(group.prompt.position)
                # Between the engines' update and the trainer's count of it, they are one ahead.
                sample.metrics["num_steps_off_policy"] = float(max(0, self._versions.current - sample.model_version))
            if group.waiting == 0:
                if group.taken:
                    self._close(group)
                else:
                    self._replenish(group)
        return None if stale else sample

    def _replenish(self, group: Asked) -> None:
        prompt = group.prompt
        if prompt.attempt + 1 < ATTEMPTS:
            self.totals.asked_again += 1
            self._prompts.ask_again(prompt)
        else:
            self.totals.given_up += 1
            self._trained.given_up(prompt.position)
            logger.warning(
                "prompt %d is given up: %d times its completions were all more than max_staleness=%d weight updates "
                "old when their turn came; raise max_staleness, or weight_sync_steps",
                prompt.position, ATTEMPTS, self.settings.max_staleness,
            )  # fmt: skip
        self._close(group)

    def _close(self, group: Asked) -> None:
        self._groups.discard(group)
        self.room()
