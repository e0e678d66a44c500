"""Exchanging the text of a live module, on modules made for the purpose."""

from __future__ import annotations

import functools
import inspect

import pytest

from tests.runtime.rebind_site import commit
from trlpatch.errors import PatchError
from trlpatch.runtime.live_objects import functions
from trlpatch.runtime.rebind import ModuleSwap, prepare_swaps
from trlpatch.runtime.undo_journal import ABSENT, Assignment, UndoJournal

METHODS = """\
import functools


def forgetful(function):
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


def remembering(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


class Base:
    def hello(self):
        return "base"


class A(Base):
    def plain(self, x=1, *, y=2):
        return ("old", x, y)

    def hello(self):
        return "old " + super().hello()

    @staticmethod
    def static():
        return "old"

    @classmethod
    def klass(cls):
        return ("old", cls)

    @property
    def prop(self):
        return "old"

    @prop.setter
    def prop(self, value):
        self.set = ("old", value)

    @functools.cached_property
    def cached(self):
        return "old"

    @remembering
    @forgetful
    def wrapped(self):
        return "old"

    @forgetful
    def hidden(self):
        return "old"

    def inner(self):
        def nested():
            return "old"

        return nested()

    def untouched(self):
        return "old"


def free():
    return "old"


if True:
    def chosen():
        return "old"
else:
    def chosen():
        return "never"
"""
TOUCHED = ["plain", "hello", "static", "klass", "prop", "cached", "wrapped", "hidden", "inner"]


def changed(text: str) -> str:
    head, tail = text.split("class Base:")
    return head + "# a line that swaps all others\nimport json as _added\n\nclass Base:" + tail.replace("old", "new")


def test_every_kind_of_function_is_reached_and_keeps_its_identity(site):
    swap = site.swap(METHODS, changed(METHODS), *(f"A.{name}" for name in TOUCHED), "free", "chosen")
    module = swap.module
    cls, instance, bound = module.A, module.A(), module.A().plain
    before = dict(vars(cls))
    commit(swap)
    lines = {"__firstlineno__"}  # Python 3.13: where inspect.getsource finds the class
    assert {name: vars(cls)[name] for name in vars(cls).keys() - lines} == {
        name: before[name] for name in before.keys() - lines
    }
    assert bound() == ("new", 1, 2)
    assert instance.plain(3, y=4) == ("new", 3, 4)
    assert instance.hello() == "new base"
    assert cls.static() == instance.prop == instance.cached == instance.wrapped() == instance.hidden() == "new"
    assert cls.klass() == ("new", cls)
    instance.prop = 5
    assert instance.set == ("new", 5)
    assert instance.inner() == "new"
    assert instance.untouched() == "old"
    assert module.free() == module.chosen() == "new"
    assert module._added.__name__ == "json"


def test_undo_is_exact(site):
    swap = site.swap(METHODS, changed(METHODS), *(f"A.{name}" for name in TOUCHED), "free")
    module = swap.module
    before, members = dict(vars(module)), dict(vars(module.A))
    code = module.A.plain.__code__
    commit(swap).undo()
    assert vars(module) == before
    assert vars(module.A) == members
    assert module.A.plain.__code__ is code
    assert inspect.getsource(module.A) in METHODS


def test_there_and_back_by_exchange(site):
    touched = [f"A.{name}" for name in TOUCHED]
    swap = site.swap(METHODS, changed(METHODS), *touched)
    commit(swap)
    commit(ModuleSwap(swap.after, swap.before, swap.touched))
    assert swap.module.A().plain() == ("old", 1, 2)
    assert not hasattr(swap.module, "_added")
    assert inspect.getsource(swap.module.A.plain) in METHODS


@pytest.mark.parametrize("on_disk", [True, False])
def test_getsource_shows_the_new_text(site, on_disk):
    swap = site.swap(METHODS, changed(METHODS), "A.plain", on_disk=on_disk)
    commit(swap)
    assert '"new", x, y' in inspect.getsource(swap.module.A.plain)
    assert "new base" not in inspect.getsource(swap.module.Base)
    assert inspect.getsource(swap.module.A).startswith(
        'class A(Base):\n    def plain(self, x=1, *, y=2):\n        return ("new"'
    )
    assert '"old"' in inspect.getsource(swap.module.A.untouched)
    assert swap.module.__spec__.loader is swap.module.__loader__
    assert swap.module.__file__ == str(swap.after.path)


CASES = {
    "free variables": (
        "class A:\n    def f(self):\n        return 1\n",
        "class A:\n    def f(self):\n        return super()\n",
        "expected free variables",
    ),
    "parameters": ("def f(a): pass\n", "def f(a, b): pass\n", "expected parameters"),
    "generator": ("def f(a): pass\n", "def f(a): yield\n", "expected kind"),
    "gone": ("def f(a): pass\n", "", "expected one definition"),
    "doubled": ("def f(a): pass\n", "def f(a): pass\ndef f(a): pass\n", "expected one definition"),
}


@pytest.mark.parametrize(("before", "after", "message"), CASES.values(), ids=CASES.keys())
def test_what_cannot_take_the_code_is_refused_before_anything_changes(site, before, after, message):
    good = site.swap("def f(): return 'old'\n", "def f(): return 'new'\n", "f")
    bad = site.swap(before, after, "A.f" if "class" in before else "f")
    with pytest.raises(PatchError, match=message) as raised:
        commit(good, bad)
    assert bad.after.module in str(raised.value)
    assert good.module.f() == "old"


def test_replaced_function_and_class_are_refused(site):
    text = "class A:\n    def f(self):\n        return 1\n"
    swap = site.swap(text, text.replace("1", "2"), "A.f")
    original = swap.module.A.f
    swap.module.A.f = lambda self: 3
    with pytest.raises(PatchError, match=r"A\.f cannot be patched .*replaced"):
        commit(swap)
    swap.module.A.f = original
    swap.module.A = type("B", (swap.module.A,), {})
    with pytest.raises(PatchError, match=r"found .*\.B, which another library"):
        commit(swap)
    del swap.module.A
    with pytest.raises(PatchError, match="found None"):
        commit(swap)


def test_a_commit_that_fails_midway_is_undone():
    class Refusing:
        value = 1

        def __setattr__(self, name, value):
            raise RuntimeError("no")

    class Target:
        kept = "old"
        gone = "old"

    journal = UndoJournal()
    with pytest.raises(RuntimeError, match="no"):
        journal.make(
            [
                Assignment(Target, "kept", "new"),
                Assignment(Target, "gone", ABSENT),
                Assignment(Target, "never", ABSENT),
                Assignment(Target, "added", 1),
                Assignment(Refusing(), "value", 2),
            ]
        )
    assert (Target.kept, Target.gone, hasattr(Target, "added")) == ("old", "old", False)


def test_functions_behind_other_wrappers():
    def inner(self):
        return "old"

    for wrapper in (functools.partialmethod(inner), functools.partial(inner), functools.lru_cache(inner)):
        assert inner in list(functions(wrapper))

    def unbound():
        return later

    assert list(functions(unbound)) == [unbound]
    later = 1


OVERRIDES = """\
from {home} import A


class Replacing(A):
    def plain(self, x=1, *, y=2):
        return "mine"


class Calling(A):
    def plain(self, x=1, *, y=2):
        return super().plain(x, y=y)


class Naming(Calling):
    def plain(self, x=1, *, y=2):
        def nested():
            return A.plain(self, x, y=y)

        return nested()


class Untouched(A):
    def untouched(self):
        return "mine"
"""


def test_overrides_that_do_not_call_the_touched_method_are_listed(site):
    swap = site.swap(METHODS, changed(METHODS), "A.plain", package="trl")
    text = OVERRIDES.format(home=swap.after.module)
    mine = site.swap(text, text).module
    site.swap(text, text, package="trl")
    (listed,) = prepare_swaps([swap]).unfixable
    assert listed.startswith(f"{mine.__name__}.Replacing.plain replaces A.plain without calling it")
