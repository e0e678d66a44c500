"""Exchanging the text of a live module that has dataclasses: configs, and those that are made from them."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from tests.runtime.rebind_site import commit
from trlpatch.errors import PatchError
from trlpatch.runtime.rebind import ModuleSwap, prepare_swaps
from trlpatch.runtime.undo_journal import UndoJournal

CONFIG = """\
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class Config:
    "doc"
    a: int = field(default=1, metadata={"help": "a"})
    KIND: ClassVar[str] = "kind"

    def __post_init__(self):
        self.post = "old"
"""
NEW_CONFIG = (
    CONFIG.replace('"kind"\n', '"kind"\n    b: dict | None = field(default=None, metadata={"help": "b"})\n')
    .replace("old", "new")
    .replace('"doc"', '"new doc"')
)


def test_config_gets_the_field_in_place(site):
    swap = site.swap(CONFIG, NEW_CONFIG, "Config.<fields>", "Config.__post_init__")
    cls = swap.module.Config
    built = cls(a=2)
    commit(swap)
    assert swap.module.Config is cls
    config = cls(a=3, b={"c": 1})
    assert (config.a, config.b, config.post) == (3, {"c": 1}, "new")
    assert [field.name for field in dataclasses.fields(cls)] == ["a", "b"]
    assert repr(config) == "Config(a=3, b={'c': 1})"
    assert config == cls(3, {"c": 1}) != cls(3)
    assert cls.__match_args__ == ("a", "b")
    assert cls.__doc__ == "new doc"
    assert cls.__annotations__["b"] == dict | None
    assert built.b is None
    assert "b: dict" in inspect.getsource(cls)


def test_config_undo_is_exact(site):
    swap = site.swap(CONFIG, NEW_CONFIG, "Config.<fields>", "Config.__post_init__")
    cls = swap.module.Config
    before = dict(vars(cls))
    commit(swap).undo()
    assert dict(vars(cls)) == before
    with pytest.raises(TypeError):
        cls(b=1)


def test_config_there_and_back(site):
    swap = site.swap(CONFIG, NEW_CONFIG, "Config.<fields>", "Config.__post_init__")
    commit(swap)
    commit(ModuleSwap(swap.after, swap.before, swap.touched))
    cls = swap.module.Config
    assert not hasattr(cls, "b")
    assert cls(a=1).post == "old"
    assert list(cls.__annotations__) == ["a", "KIND"]
    with pytest.raises(TypeError):
        cls(b=1)


SUBCLASSES = """\
from dataclasses import dataclass, field
from typing import ClassVar

from {home} import Config


class Plain(Config):
    pass


@dataclass
class Sub(Plain):
    a: int = field(default=7)
    c: list = field(default_factory=list)
    d: float = 0.5
    MODE: ClassVar[str] = "mode"

    def __post_init__(self):
        super().__post_init__()
        self.sub = True


@dataclass
class WithInit(Config):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.custom = True


@dataclass(eq=False, order=False, repr=False)
class Quiet(Sub):
    e: int = field(default=0, kw_only=True)
"""


def test_upstreams_own_config_subclasses_get_the_field_too(site, monkeypatch):
    swap = site.swap(CONFIG, NEW_CONFIG, "Config.<fields>", "Config.__post_init__", package="trl")
    text = SUBCLASSES.format(home=swap.after.module)
    subs = site.swap(text, text, package="trl").module
    mine = site.swap(text, text).module
    before = {cls: dict(vars(cls)) for cls in (subs.Plain, subs.Sub, subs.WithInit, subs.Quiet, mine.Sub)}
    prepared = prepare_swaps([swap])
    journal = UndoJournal()
    prepared.commit(journal)
    sub = subs.Sub(a=1, b={"x": 1}, c=[1])
    assert (sub.a, sub.b, sub.c, sub.d, sub.post, sub.sub) == (1, {"x": 1}, [1], 0.5, "new", True)
    assert subs.Sub().a == 7
    assert subs.Sub().c is not subs.Sub().c
    assert subs.WithInit(b={}).custom
    assert subs.WithInit(b={}).b == {}
    assert subs.Quiet(b={}, e=3).e == 3
    assert subs.Plain(b={}).b == {}
    assert "__eq__" not in vars(subs.Quiet)
    assert subs.Sub.__qualname__ == "Sub"
    with pytest.raises(TypeError):
        mine.Sub(b={})
    assert mine.Sub().b is None
    listed = "\n".join(prepared.unfixable)
    assert f"{mine.__name__}.Sub(...) does not take b" in listed
    assert "trl." not in listed
    assert f"{mine.__name__}.Plain" not in listed
    journal.undo()
    assert {cls: dict(vars(cls)) for cls in before} == before


def test_only_dataclasses_without_slots_can_gain_a_field(site):
    slots = CONFIG.replace("@dataclass", "@dataclass(slots=True)").replace("KIND", "# KIND")
    swap = site.swap(slots, slots.replace("a: int", "z: int = 1\n    a: int"), "Config.<fields>")
    with pytest.raises(PatchError, match="without __slots__"):
        commit(swap)
