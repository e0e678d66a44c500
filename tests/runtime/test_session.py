from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import re
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path

import pytest

import trlpatch.hooks
from tests.helpers import SKIP
from trlpatch import errors
from trlpatch.options import active
from trlpatch.rewrite import rewriter
from trlpatch.runtime import session
from trlpatch.runtime.cache import Cache
from trlpatch.runtime.loader import PatchedFinder


def finders() -> list[PatchedFinder]:
    return [finder for finder in sys.meta_path if isinstance(finder, PatchedFinder)]


def trainer_module():
    return importlib.import_module("trl.trainer.grpo_trainer")


def test_patched_text_runs_under_trls_own_names(fake_trl, patch_grpo, monkeypatch):
    calls = []
    report = patch_grpo()
    monkeypatch.setattr(trlpatch.hooks, "configure", lambda *arguments: calls.append(arguments))
    import trl

    trainer = trl.GRPOTrainer("model")
    assert calls == [(trainer, "model", None)]
    assert trl.GRPOTrainer.__module__ == "trl.trainer.grpo_trainer"
    assert trl.GRPOTrainer is trainer_module().GRPOTrainer
    assert trainer_module().__file__ == report.files["grpo"]
    assert Path(report.files["grpo"]).name == "grpo_trainer.py"
    assert fake_trl.cache in Path(report.files["grpo"]).parents
    assert {entry.patch for entry in report.applied} == {"configure", "sampling_config"}
    assert report.bypassed == ()


def test_getsource_and_traceback_show_the_patched_lines(patch_grpo):
    patch_grpo()
    cls = trainer_module().GRPOTrainer
    assert "_trlpatch.configure(self, model, args)" in inspect.getsource(cls)
    assert "_trlpatch.configure(self, model, args)" in inspect.getsource(cls.__init__)
    with pytest.raises(RuntimeError) as raised:
        cls("bad")
    shown = "".join(traceback.format_exception(raised.value))
    assert 'raise RuntimeError("bad model")' in shown
    assert trainer_module().__file__ in shown


def test_config_takes_the_new_field_also_in_trls_subclasses(patch_grpo):
    patch_grpo()
    import trl

    for cls in (trl.GRPOConfig, trl.DPPOConfig):
        config = cls(beta=1.0, vllm_sampling_params={"min_p": 0.1})
        assert config.vllm_sampling_params == {"min_p": 0.1}
        assert config.checked
        assert config.base_checked


def test_second_call_is_a_quiet_no_op(patch_grpo):
    first = patch_grpo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch_grpo() is first
        assert patch_grpo(skip=list(reversed(SKIP))) is first
    assert session.status() is first
    assert len(finders()) == 1


def test_second_call_may_change_what_hooks_read(patch_grpo):
    first = patch_grpo(sleep="auto")
    assert patch_grpo(sleep="off", colocate="never") is first
    assert (active().sleep, active().colocate) == ("off", "never")


def test_second_call_with_another_skip_is_refused(patch_grpo):
    patch_grpo()
    with pytest.raises(errors.OptionsConflict, match=r"unpatch\(\) first"):
        patch_grpo(skip=())


def test_wider_second_call_patches_the_rest(fake_trl, patch_grpo):
    fake_trl.write(
        "experimental/gold/gold_trainer.py",
        "class GOLDTrainer:\n    def __init__(self, model, args=None):\n        self.model = model\n",
    )
    narrow = patch_grpo()
    assert set(narrow.files) == {"grpo", "grpo_config"}
    wide = session.PatchFastRL(skip=SKIP, on_drift="stock", algorithm="grpo")
    assert wide is narrow
    with pytest.raises(errors.PatchError, match="gold needs it"):
        session.PatchFastRL(skip=SKIP)
    assert session.status() is narrow
    fake_trl.write(
        "experimental/gold/gold_config.py",
        (fake_trl.root / "trainer/grpo_config.py").read_text().replace("GRPO", "GOLD"),
    )
    wide = session.PatchFastRL(skip=SKIP)
    assert set(wide.files) == {"grpo", "grpo_config", "gold", "gold_config"}
    assert {entry.target for entry in wide.entries} == set(wide.files)
    assert set(finders()[0].sources) >= {"trl.trainer.grpo_trainer", "trl.experimental.gold.gold_trainer"}
    assert patch_grpo() is wide


def test_drift_raises_and_nothing_is_patched(fake_trl, patch_grpo):
    fake_trl.drift()
    (fake_trl.root / "trainer/grpo_config.py").write_text("class GRPOConfig:\n    pass\n")
    with pytest.raises(errors.AnchorDrift) as raised:
        patch_grpo()
    text = str(raised.value)
    file = fake_trl.root / "trainer/grpo_trainer.py"
    for part in (
        "configure on grpo of TRL 0.25.0",
        "sampling_config on grpo_config",
        f"{file}:",
        "GRPOTrainer",
        "expected 1, found 0",
        "nearest: line",
        "TRL is unpatched",
        "skip=('configure', 'sampling_config')",
        "trlpatch check",
    ):
        assert part in text, text
    assert not session.status()
    assert finders() == []
    assert "_trlpatch" not in vars(trainer_module())


def test_drift_may_leave_the_coupled_targets_stock(fake_trl, patch_grpo):
    fake_trl.drift()
    with pytest.warns(errors.LeftStock, match="expected 1, found 0"):
        report = patch_grpo(on_drift="stock")
    assert report.cache == {"grpo": "off", "grpo_config": "off"}
    assert [entry.status for entry in report.entries] == ["failed"]
    assert "_trlpatch" not in vars(trainer_module())
    import trl

    with pytest.raises(TypeError):
        trl.GRPOConfig(vllm_sampling_params={})
    assert patch_grpo(on_drift="stock") is report
    with pytest.raises(errors.AnchorDrift):
        patch_grpo(on_drift="raise")


def test_targets_that_are_not_coupled_are_patched_all_the_same(fake_trl):
    fake_trl.write("trainer/online_dpo_trainer.py", "class OnlineDPOTrainer:\n    pass\n")
    config = (fake_trl.root / "trainer/grpo_config.py").read_text(encoding="utf-8")
    fake_trl.write("trainer/online_dpo_config.py", config.replace("GRPO", "OnlineDPO"))
    with pytest.warns(errors.LeftStock, match=r"do not fit: online_dpo; stays stock.*: online_dpo_config;"):
        report = session.PatchFastRL(on_drift="stock", skip=SKIP)
    assert report.cache == {"grpo": "miss", "grpo_config": "miss", "online_dpo": "off", "online_dpo_config": "off"}
    assert {entry.target for entry in report.applied} == {"grpo", "grpo_config"}


@pytest.fixture
def failing_check(monkeypatch):
    """Every output check fails, and the working directory is one in which nothing may appear."""
    monkeypatch.setattr(rewriter, "problems", lambda *_: ["the signature changed"])
    here = Path(tempfile.mkdtemp())
    monkeypatch.chdir(here)
    yield
    assert list(here.iterdir()) == []
    here.rmdir()


def rejected_file(text: str) -> Path:
    return Path(re.search(r"^  rejected (.+grpo_trainer\.py)$", text, re.MULTILINE)[1])


def test_a_failed_output_check_names_the_file_with_the_rejected_text(fake_trl, patch_grpo, failing_check):
    with pytest.raises(errors.OutputCheckError) as raised:
        patch_grpo()
    text = str(raised.value)
    file = fake_trl.root / "trainer/grpo_trainer.py"
    assert "output check on grpo of TRL 0.25.0" in text
    assert "check    the signature changed" in text
    assert "skip=" not in text
    rejected = rejected_file(text)
    assert f"diff -u {file} {rejected}" in text
    assert fake_trl.cache in rejected.parents
    assert "_trlpatch.configure(self, model, args)" in rejected.read_text()
    with pytest.raises(errors.OutputCheckError) as again:
        patch_grpo()
    assert rejected_file(str(again.value)) == rejected
    assert not session.status()
    assert Cache().clear() == 2
    assert not rejected.exists()


def test_rejected_text_is_kept_elsewhere_if_the_cache_cannot_be_written(
    fake_trl, patch_grpo, failing_check, monkeypatch, tmp_path
):
    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(fake_trl.write("../blocked", "").resolve()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(errors.LeftStock) as caught:
        report = patch_grpo(on_drift="stock")
    rejected = rejected_file(str(caught[0].message))
    assert tmp_path in rejected.parents
    assert "_trlpatch.configure" in rejected.read_text()
    assert [(entry.patch, entry.status) for entry in report.entries] == [("output check", "failed")] * 2


def test_rejected_text_is_never_kept_in_the_working_directory(fake_trl, patch_grpo, failing_check, monkeypatch):
    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(fake_trl.write("../blocked", "").resolve()))
    monkeypatch.setattr(tempfile, "tempdir", str(Path.cwd()))
    with pytest.raises(errors.OutputCheckError) as raised:
        patch_grpo()
    assert "  rejected " not in str(raised.value)


def test_broken_python_is_one_clear_failure(fake_trl, patch_grpo):
    fake_trl.write("trainer/grpo_trainer.py", "class GRPOTrainer(:\n")
    with pytest.raises(errors.PatchError, match=r"grpo_trainer.py:1 is not Python.*\n.*\n.*reinstall|not Python"):
        patch_grpo()


def test_unknown_skip_lists_the_known_also_on_a_warm_start(patch_grpo):
    patch_grpo()
    session.revert()
    with pytest.raises(errors.UnknownPatch, match=r"(?s)typo.*sampling_config"):
        patch_grpo(skip=("typo",))


def test_unknown_algorithm_lists_the_known(fake_trl):
    with pytest.raises(errors.UnknownAlgorithm, match="grpo"):
        session.PatchFastRL("ppoo", skip=SKIP)


def test_untested_release_is_said_once(fake_trl):
    fake_trl.version("99.0.0")
    fake_trl.write("generation/vllm_generation.py", "class VLLMGeneration:\n    pass\n")
    with pytest.warns(errors.UntestedRelease, match=r"99\.0\.0") as caught:
        report = session.PatchFastRL("grpo", skip=SKIP)
    assert len([w for w in caught if w.category is errors.UntestedRelease]) == 1
    assert "untested release" in "\n".join(report.notes)


def test_a_file_that_a_trainer_needs_is_not_there(fake_trl):
    fake_trl.version("0.28.0")
    with pytest.raises(errors.PatchError, match=r"(?s)vllm_generation.*grpo needs it") as raised:
        session.PatchFastRL("grpo", skip=SKIP)
    assert not isinstance(raised.value, errors.AnchorDrift)


def test_disabled_by_environment(fake_trl, patch_grpo, monkeypatch):
    monkeypatch.setenv("TRLPATCH_DISABLE", "1")
    report = patch_grpo()
    assert report.disabled
    assert "disabled" in str(report)
    assert report.to_dict()["disabled"] is True
    assert patch_grpo() is report is session.status()
    assert finders() == []
    assert not fake_trl.cache.exists()
    monkeypatch.setenv("TRLPATCH_DISABLE", "0")
    assert not patch_grpo().disabled


def test_unsloths_call(fake_trl):
    assert session.PatchFastRL("GRPO", object, skip=SKIP).applied


def test_report_reads_well_and_is_json(patch_grpo):
    report = patch_grpo()
    text = str(report.full())
    rows = [line.split() for line in text.splitlines()]
    assert ["grpo", "configure", "applied", "fits", "trl", ">=0.18"] in rows
    assert "left out by skip" in text
    assert report.files["grpo"] in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["trl"] == "0.25.0"
    assert plain["cache"] == {"grpo": "miss", "grpo_config": "miss"}
    assert plain["milliseconds"] > 0


def test_report_says_which_trainers_are_left_alone(fake_trl):
    for name in ("nash_md", "xpo"):
        fake_trl.write(f"trainer/{name}_trainer.py", "")
    config = (fake_trl.root / "trainer/grpo_config.py").read_text(encoding="utf-8")
    trainer = (fake_trl.root / "trainer/grpo_trainer.py").read_text(encoding="utf-8")
    fake_trl.write("trainer/online_dpo_config.py", config.replace("GRPO", "OnlineDPO"))
    fake_trl.write("trainer/online_dpo_trainer.py", trainer.replace("GRPO", "OnlineDPO"))
    note = "NashMDTrainer and XPOTrainer are left alone: TRL generates with transformers for them"
    assert note not in str(session.PatchFastRL("grpo", skip=SKIP).full())
    assert note in str(session.PatchFastRL("online_dpo", skip=SKIP).full())
    assert note in str(session.PatchFastRL(skip=SKIP, on_drift="stock").full())


def test_a_failure_of_the_report_says_where_as_json(fake_trl, patch_grpo):
    fake_trl.drift()
    with pytest.warns(errors.LeftStock):
        report = patch_grpo(on_drift="stock")
    (entry,) = json.loads(json.dumps(report.to_dict()))["entries"]
    assert entry["drift"]["file"] == str(fake_trl.root / "trainer/grpo_trainer.py")
    assert (entry["drift"]["expected"], entry["drift"]["found"]) == (1, 0)


def test_a_hook_that_came_first_and_asks_pathfinder_gets_the_patched_file(patch_grpo):
    report = patch_grpo()

    class Wrapping:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.machinery.PathFinder.find_spec(name, path, target)

    sys.meta_path.insert(0, Wrapping)
    try:
        assert trainer_module().__file__ == report.files["grpo"]
    finally:
        sys.meta_path.remove(Wrapping)
    assert report.bypassed == ()


def test_report_tells_when_another_hook_came_first(fake_trl, patch_grpo):
    report = patch_grpo()

    class Squelching:
        @staticmethod
        def find_spec(name, path=None, target=None):
            file = fake_trl.site.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file) if file.exists() else None

    sys.meta_path.insert(0, Squelching)
    try:
        trainer_module()
    finally:
        sys.meta_path.remove(Squelching)
    assert ("trl.trainer.grpo_trainer" in report.bypassed, "another import hook" in str(report.full())) == (True, True)


def test_dump_writes_what_runs(fake_trl, patch_grpo, monkeypatch, tmp_path):
    monkeypatch.setenv("TRLPATCH_DUMP", str(tmp_path / "dump"))
    report = patch_grpo()
    dumped = tmp_path / "dump/0.25.0/trl/trainer/grpo_trainer.py"
    assert dumped.read_text() == Path(report.files["grpo"]).read_text()


def test_dump_that_cannot_be_written_warns(patch_grpo, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRLPATCH_DUMP", str(tmp_path / "file"))
    with pytest.warns(errors.DumpUnavailable, match="file"):
        report = patch_grpo()
    assert report.applied


def test_a_warning_turned_error_leaves_a_complete_session(fake_trl, patch_grpo, monkeypatch):
    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(fake_trl.write("../blocked", "").resolve()))
    with pytest.raises(errors.CacheUnavailable):  # pytest turns warnings into errors here
        patch_grpo()
    assert session.status().applied
    assert "_trlpatch" in vars(trainer_module())


def test_threads_get_one_report(patch_grpo):
    reports = []
    threads = [threading.Thread(target=lambda: reports.append(patch_grpo())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 8
    assert all(report is reports[0] for report in reports)
    assert len(finders()) == 1
