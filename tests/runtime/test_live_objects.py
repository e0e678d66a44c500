"""Which objects of a class are alive, found without a collection where there are none."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from trlpatch.runtime.live_objects import instances


class Trainer:
    def __init__(self) -> None:
        self.me = self  # a cycle, as every real trainer has


class Slotted(Trainer):
    __slots__ = ("mine",)


class Other:
    pass


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generations that were collected since."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            seen.append(info["generation"])

    gc.collect()
    gc.disable()
    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)
    gc.enable()


def test_instances_of_subclasses_count_by_their_class() -> None:
    kept = [Trainer(), Slotted(), Slotted(), Other()]
    assert instances({Trainer}) == {"Trainer": 1, "Slotted": 2}
    assert instances({Slotted}) == {"Slotted": 2}
    assert instances(set()) == {}
    del kept


def test_an_object_of_a_class_with_its_own_metaclass_counts() -> None:
    class Meta(type):
        pass

    class Made(Trainer, metaclass=Meta):
        pass

    kept = Made()
    assert instances({Trainer}) == {kept.__class__.__qualname__: 1}


def test_what_is_garbage_does_not_count(collections: list[int]) -> None:
    Trainer()
    assert instances({Trainer}) == {}
    assert collections == [2]


def test_nothing_is_collected_where_none_was_built(collections: list[int]) -> None:
    assert instances({Trainer}) == {}
    assert collections == []
