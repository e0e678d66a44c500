"""The stacks that a tier runs on at once: what they say, and the status of all."""

from __future__ import annotations

from typing import IO

import pytest

from tests.cpu import stack
from tests.golden.sources import Stack, pinned, stacks

NEWEST = list(pinned().values())[-1].cpu
(OTHER,) = set(stacks()) - {NEWEST}


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ({NEWEST: 0, OTHER: 0}, 0),
        ({NEWEST: 1, OTHER: 0}, 1),
        ({NEWEST: 0, OTHER: 2}, 2),
        ({NEWEST: -9, OTHER: 0}, -9),
        ({NEWEST: 0, OTHER: -9}, -9),
    ],
)
def test_a_stack_that_fails_or_is_killed_is_the_status_of_all(
    statuses: dict[str, int], status: int, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def tier(one: Stack, arguments: list[str], out: IO[bytes] | None = None) -> int:
        assert (out is None) == (one.name == NEWEST)
        if out is not None:
            out.write(f"said of {one.name}\n".encode())
        return statuses[one.name]

    monkeypatch.setattr(stack, "torch_tier", tier)
    assert stack.main("unit-torch", []) == status
    assert capfdbinary.readouterr().out == f"said of {OTHER}\n".encode()
