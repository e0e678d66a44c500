"""TRL is patched by who loads a model with an engine, as PatchFastRL() would have done."""

from __future__ import annotations

import contextlib
import logging
import sys
from types import ModuleType

import pytest

from tests.helpers import SKIP
from trlpatch import FastLanguageModel, errors
from trlpatch.engine import build
from trlpatch.loading import load_config
from trlpatch.options import Options, active
from trlpatch.runtime import automatic, session
from trlpatch.runtime.children import environment_for

LOAD = """
import sys, types
from trlpatch.loading import load_config
load_config.check_packages = lambda config: None
import contextlib
from trlpatch.engine import build
build.random_state_kept = contextlib.nullcontext
loading = sys.modules["trlpatch.loading.loading"] = types.ModuleType("trlpatch.loading.loading")
loading.load = lambda config: print("loads, trl imported:", "trl" in sys.modules)
import trlpatch
"""
SHOW = "import trl\ntrl.GRPOTrainer\nprint('_trlpatch' in vars(sys.modules['trl.trainer.grpo_trainer']))\n"


@pytest.fixture
def as_tiny(monkeypatch):
    """The default options leave out what the tiny trainer has no code for."""
    monkeypatch.setattr(automatic, "Options", lambda: Options("grpo", skip=SKIP))


@pytest.fixture
def loaded(monkeypatch):
    """What reaches the loader; nothing is loaded."""
    seen = []
    loading = ModuleType("trlpatch.loading.loading")
    loading.load = seen.append
    monkeypatch.setitem(sys.modules, "trlpatch.loading.loading", loading)
    monkeypatch.setattr(load_config, "check_packages", lambda config: None)
    monkeypatch.setattr(build, "random_state_kept", contextlib.nullcontext)  # numpy and torch are not needed here
    return seen


def load(**arguments):
    return FastLanguageModel.from_pretrained("model", load_in_4bit=False, **arguments)


def test_loading_with_an_engine_patches_trl(fake_trl, as_tiny, loaded):
    load()
    assert len(loaded) == 1
    assert session.status().applied
    import trl

    assert "_trlpatch" in vars(sys.modules[trl.GRPOTrainer.__module__])


@pytest.mark.parametrize("arguments", [{"patch_trl": False}, {"fast_inference": False}])
def test_without_an_engine_or_the_wish_it_does_not(fake_trl, as_tiny, loaded, arguments):
    load(**arguments)
    assert len(loaded) == 1
    assert not session.is_decided()


def test_what_was_patched_before_stays_as_it_was(fake_trl, patch_grpo, loaded):
    report = patch_grpo(sleep="off")
    load()
    assert session.status() is report
    assert active().sleep == "off"


def test_a_later_call_works_as_a_second_call_does(fake_trl, as_tiny, loaded, patch_grpo):
    load()
    report = session.status()
    assert patch_grpo(sleep="off") is report
    assert active().sleep == "off"
    session.revert()
    load()
    with pytest.raises(
        errors.OptionsConflict,
        match=r"after FastLanguageModel\.from_pretrained, which .*unpatch\(\) first, or PatchFastRL before FastLang",
    ):
        patch_grpo(skip=())


def test_without_trl_it_is_a_line_for_debugging(fake_trl, loaded, caplog, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(fake_trl.site)])
    with caplog.at_level(logging.DEBUG, "trlpatch"):
        load()
    assert len(loaded) == 1
    assert "FastLanguageModel.from_pretrained patches nothing: TRL is not installed" in caplog.text
    assert not session.is_decided()


def test_a_patch_that_does_not_fit_is_the_same_error_before_anything_is_loaded(fake_trl, as_tiny, loaded):
    fake_trl.drift()
    with pytest.raises(errors.AnchorDrift, match="expected 1, found 0") as raised:
        load()
    assert "patch_trl=False" in "".join(raised.value.__notes__)
    assert loaded == []
    assert not session.is_decided()
    load(patch_trl=False)
    assert len(loaded) == 1


def test_disabled_by_environment(fake_trl, loaded, monkeypatch):
    fake_trl.drift()
    monkeypatch.setenv("TRLPATCH_DISABLE", "1")
    load()
    assert len(loaded) == 1
    assert session.status().disabled


def test_a_child_of_trlpatch_run_has_the_options_of_its_parent(fake_trl):
    options = Options("grpo", skip=SKIP, sleep="off")
    done = fake_trl.python(
        f"{LOAD}trlpatch.FastLanguageModel.from_pretrained('model', load_in_4bit=False)\n{SHOW}"
        "from trlpatch.options import active\nprint(active().sleep)\n",
        **environment_for(options, fake_trl.environment()),
    )
    assert done.stdout == "loads, trl imported: False\nTrue\noff\n", done.stderr


def test_a_trl_that_was_imported_first_is_patched_in_place(fake_trl, as_tiny, loaded):
    import trl

    trainer = trl.GRPOTrainer
    with pytest.warns(errors.AlreadyImported):
        load()
    assert trl.GRPOTrainer is trainer
    assert "_trlpatch" in trainer.__init__.__code__.co_names
