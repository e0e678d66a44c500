"""PatchFastRL after TRL was imported, and unpatch."""

from __future__ import annotations

import gc
import importlib
import inspect
import pickle
import sys
from dataclasses import dataclass

import pytest

import trlpatch.hooks
from trlpatch import errors
from trlpatch.options import Options, active
from trlpatch.runtime import session
from trlpatch.runtime.loader import PatchedFinder


@pytest.fixture
def configured(monkeypatch):
    calls = []
    monkeypatch.setattr(trlpatch.hooks, "configure", lambda *arguments: calls.append(arguments))
    return calls


def test_modules_imported_before_are_patched_in_place(fake_trl, patch_grpo, configured):
    import trl

    trainer_class, config_class, sub = trl.GRPOTrainer, trl.GRPOConfig, trl.DPPOConfig
    init = trainer_class.__init__
    with pytest.warns(errors.AlreadyImported, match=r"trl\.trainer\.grpo_trainer, trl\.trainer\.grpo_config"):
        report = patch_grpo()
    assert set(report.rebound) == {"trl.trainer.grpo_trainer", "trl.trainer.grpo_config"}
    assert "patched in place" in str(report.full())
    assert (trl.GRPOTrainer, trl.GRPOConfig, trainer_class.__init__) == (trainer_class, config_class, init)
    trainer = trainer_class("model")
    assert configured == [(trainer, "model", None)]
    assert config_class(vllm_sampling_params={}).vllm_sampling_params == {}
    assert sub(vllm_sampling_params={}, delta=2.0).delta == 2.0
    assert report.bypassed == ()
    assert "_trlpatch.configure" in inspect.getsource(trainer_class)
    assert pickle.loads(pickle.dumps(trainer_class)) is trainer_class


def test_half_imported_is_half_and_half(patch_grpo, configured):
    import trl

    config_class = trl.GRPOConfig
    with pytest.warns(errors.AlreadyImported):
        report = patch_grpo()
    assert report.rebound == ("trl.trainer.grpo_config",)
    assert trl.GRPOTrainer("model").args.__class__ is config_class
    assert configured


def test_classes_out_of_reach_are_listed(patch_grpo):
    import trl

    class Mine(trl.GRPOTrainer):
        def __init__(self):
            pass

    @dataclass
    class MineConfig(trl.GRPOConfig):
        pass

    with pytest.warns(errors.AlreadyImported, match=r"out of reach: .*Mine\.__init__"):
        report = patch_grpo()
    text = "\n".join(report.unfixable)
    assert f"{Mine.__qualname__}.__init__ replaces GRPOTrainer.__init__" in text
    assert f"{MineConfig.__qualname__}(...) does not take vllm_sampling_params" in text
    assert "out of reach" in str(report)


def test_a_live_trainer_stops_it_before_anything_changes(patch_grpo):
    import trl

    class Mine(trl.GRPOTrainer):
        pass

    alive = [trl.GRPOTrainer("model"), Mine("model"), Mine("model")]
    with pytest.raises(
        errors.TrainerAlreadyBuilt, match=r"1 GRPOTrainer, 2 .*Mine built from stock TRL.*before building"
    ):
        patch_grpo()
    assert not session.status()
    assert not any(isinstance(finder, PatchedFinder) for finder in sys.meta_path)
    assert "_trlpatch" not in vars(sys.modules["trl.trainer.grpo_trainer"])
    assert not hasattr(trl.GRPOConfig, "vllm_sampling_params")
    alive.clear()
    with pytest.warns(errors.AlreadyImported):
        assert patch_grpo().applied


def test_a_deleted_trainer_in_a_cycle_does_not_count(patch_grpo):
    import trl

    gc.disable()
    try:
        trainer = trl.GRPOTrainer("model")
        trainer.itself = trainer
        del trainer
        with pytest.warns(errors.AlreadyImported):
            assert patch_grpo().applied
    finally:
        gc.enable()


def test_a_class_that_was_replaced_stops_it_before_anything_changes(patch_grpo):
    import trl

    module = importlib.import_module("trl.trainer.grpo_trainer")
    module.GRPOTrainer = type("UnslothGRPOTrainer", (trl.GRPOTrainer,), {})
    with pytest.raises(errors.PatchError, match="UnslothGRPOTrainer"):
        patch_grpo()
    assert not session.status()
    assert not any(isinstance(finder, PatchedFinder) for finder in sys.meta_path)
    assert not hasattr(trl.GRPOConfig, "vllm_sampling_params")


@pytest.mark.parametrize("early", [False, True])
def test_unpatch_restores_stock(fake_trl, patch_grpo, configured, early):
    import trl

    if early:
        stock = {cls: dict(vars(cls)) for cls in (trl.GRPOTrainer, trl.GRPOConfig)}
        modules = {
            name: dict(vars(sys.modules[name])) for name in ("trl.trainer.grpo_trainer", "trl.trainer.grpo_config")
        }
        with pytest.warns(errors.AlreadyImported):
            patch_grpo(sleep="off")
    else:
        patch_grpo(sleep="off")
    trainer_class, config_class, late_config = trl.GRPOTrainer, trl.GRPOConfig, trl.DPPOConfig
    trainer_class("model")
    assert len(configured) == 1
    assert late_config(vllm_sampling_params={}).vllm_sampling_params == {}
    gc.collect()
    configured.clear()

    session.revert()

    assert (trl.GRPOTrainer, trl.GRPOConfig) == (trainer_class, config_class)
    assert trainer_class("model").step() == "step"
    assert configured == []
    for cls in (config_class, late_config):
        with pytest.raises(TypeError, match="vllm_sampling_params"):
            cls(vllm_sampling_params={})
        assert cls(beta=2.0).beta == 2.0
    assert not hasattr(config_class, "vllm_sampling_params")
    for name in ("grpo_trainer", "grpo_config"):
        module = sys.modules[f"trl.trainer.{name}"]
        assert module.__file__ == module.__spec__.origin == str(fake_trl.root / f"trainer/{name}.py")
        assert "_trlpatch" not in vars(module)
        assert "_trlpatch" not in inspect.getsource(module)
    assert "_trlpatch" not in inspect.getsource(trainer_class)
    assert "_trlpatch" not in inspect.getsource(trainer_class.__init__)
    assert not any(isinstance(finder, PatchedFinder) for finder in sys.meta_path)
    assert not session.status()
    assert active() == Options()
    if early:
        assert {cls: dict(vars(cls)) for cls in stock} == stock
        assert {name: dict(vars(sys.modules[name])) for name in modules} == modules
    session.revert()


def test_patch_again_after_unpatch(patch_grpo, configured):
    import trl

    patch_grpo()
    trl.GRPOTrainer("model")
    configured.clear()
    session.revert()
    with pytest.warns(errors.AlreadyImported):
        patch_grpo()
    trl.GRPOTrainer("model")
    assert len(configured) == 1
    assert trl.GRPOConfig(vllm_sampling_params={}).vllm_sampling_params == {}


def test_unpatch_before_any_import_leaves_no_trace(fake_trl, patch_grpo):
    patch_grpo()
    session.revert()
    import trl

    assert inspect.getfile(trl.GRPOTrainer) == str(fake_trl.root / "trainer/grpo_trainer.py")


def test_unpatch_warns_of_live_trainers(patch_grpo):
    patch_grpo()
    import trl

    trainer = trl.GRPOTrainer("model")
    with pytest.warns(errors.PatchedTrainersAlive, match="1 GRPOTrainer"):
        session.revert()
    assert trainer.generate() == "generate"


def test_unpatch_after_somebody_else_patched_changes_nothing(patch_grpo, monkeypatch):
    patch_grpo()
    import trl

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", lambda self: None)
    with pytest.raises(errors.PatchError, match=r"__init__ cannot be returned to TRL's own code.*new process"):
        session.revert()
    assert session.status()
    assert trl.GRPOConfig(vllm_sampling_params={}).vllm_sampling_params == {}
