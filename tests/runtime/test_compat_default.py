"""The default, compat="off": upstream's classes run as they are, and what others do to them stays."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import pickle
import sys
import warnings
from typing import Any

import pytest

from trlpatch.runtime import compat


def test_no_class_of_upstream_has_another_init(upstream, monkeypatch):
    upstream.import_all()
    classes = (upstream.TrainingArguments, upstream.GRPOConfig, upstream.Trainer, upstream.GRPOTrainer)
    before = [dict(vars(cls)) for cls in classes]
    signatures = [inspect.signature(cls) for cls in classes]
    for name in ("classes", "configs", "removed"):
        monkeypatch.delitem(sys.modules, f"trlpatch.runtime.compat.{name}", raising=False)
    compat.install("off")
    assert "trlpatch.runtime.compat.classes" not in sys.modules
    assert "trlpatch.runtime.compat.removed" not in sys.modules, "a warm start does not pay for the table"
    for cls, members, signature in zip(classes, before, signatures, strict=True):
        assert {name: value for name, value in vars(cls).items() if name != "__new__"} == members
        assert inspect.signature(cls) == signature


def test_a_warning_of_upstream_names_the_users_line(upstream):
    def warns(self: Any) -> None:
        warnings.warn("deprecated", FutureWarning, stacklevel=3)

    upstream.GRPOConfig.__post_init__ = warns
    compat.install("off")
    with pytest.warns(FutureWarning, match="deprecated") as seen:
        upstream.GRPOConfig()
    assert seen[0].filename == __file__


def test_objects_are_made_as_before_and_after(upstream):
    class Named:
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().__new__(cls)
            made.given = (args, kwargs)
            return made

    class Mine(upstream.Trainer, Named):
        pass

    compat.install("off")
    for _ in range(2):
        made = upstream.GRPOConfig("place", num_generations=4)
        for twin in (made, copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert (twin.output_dir, twin.num_generations) == ("place", 4)
        assert upstream.GRPOTrainer("model", args=made).args is made
        assert Mine("model", args=1).given == (("model",), {"args": 1})
        compat.remove()  # and once more: CPython cannot delete a __new__


def test_dataclasses_defined_later_and_seldom_inits_are_met(upstream):
    class Partial(upstream.Trainer):
        __init__ = functools.partialmethod(upstream.Trainer.__init__, "model")

    compat.install("off")

    @dataclasses.dataclass
    class Later(upstream.GRPOConfig):
        extra: int = 3

    with pytest.raises(TypeError, match="warmup_ratio") as raised:
        Later(warmup_ratio=0.1, extra=4)
    assert raised.value.__notes__[0].startswith("Later(warmup_ratio=...): gone since transformers 5")
    compat.install("on")
    assert Partial(processing_class=1).model == "model"


@pytest.mark.parametrize("mode", ["off", "on"])
def test_what_others_wrap_meanwhile_stays(upstream, mode):
    compat.install(mode)
    calls: list[str] = []
    before = upstream.SFTTrainer.__init__

    @functools.wraps(before)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append("called")
        before(self, *args, **kwargs)

    upstream.SFTTrainer.__init__ = wrapped
    compat.remove()
    assert upstream.SFTTrainer.__init__ is wrapped
    with pytest.raises(TypeError, match="tokenizer"):
        upstream.SFTTrainer("model", tokenizer=3)
    compat.install("on")
    assert upstream.SFTTrainer("model", tokenizer=3).processing_class == 3
    assert calls == ["called"] * 2


def test_a_finder_without_find_spec_is_passed_over(upstream, monkeypatch):
    compat.install("off")
    watch = sys.meta_path[0]
    package = importlib.import_module("transformers")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "meta_path", [watch, object(), *sys.meta_path[1:]])
        assert watch.find_spec("transformers.trainer", package.__path__) is not None
