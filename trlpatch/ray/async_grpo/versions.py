"""Which version of the policy the trainer counts, and what the engines call it."""

from __future__ import annotations

from trlpatch.ray.messages import Version

NEVER_SENT = -(2**31)
"""Number of what no trainer has sent: too old for any `max_staleness`."""
_KEPT = 1024
"""More than requests can be in flight."""


class PolicyVersions:
    """Shared by the worker and the weight transfer of one trainer."""

    def __init__(self) -> None:
        """No policy has been sent yet."""
        self.current = 0
        """As the trainer counts: the initial transfer makes it 1."""
        self._numbers: dict[Version, int] = {}

    @property
    def next(self) -> int:
        """The number that the policy being sent now will have."""
        return self.current + 1

    def sent(self, held: Version) -> None:
        """The engines hold the policy being sent now, and call it `held`."""
        # What has not changed keeps the engines' name, and is as good as new.
        self._numbers.pop(held, None)
        self._numbers[held] = self.next
        if len(self._numbers) > _KEPT:
            del self._numbers[next(iter(self._numbers))]

    def of(self, held: Version) -> int:
        """The trainer's number of what an engine sampled with; NEVER_SENT where it sent no such thing."""
        return self._numbers.get(held, NEVER_SENT)
