"""The option `logps`, from PatchFastRL to the patched text, the cache and the report."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tests.runtime.test_old_logps_option import planned
from trlpatch import errors
from trlpatch.options import Options
from trlpatch.runtime import session
from trlpatch.runtime.cache import entry_key
from trlpatch.runtime.report import PatchReport

PATCH = "logps"


def test_only_chunked_asks_for_the_patch():
    assert Options().asked_for == Options(logps="stock").asked_for == ()
    assert Options(logps="chunked").asked_for == (PATCH,)
    assert Options(logps="chunked", old_logps="reuse").asked_for == (PATCH, "old_logps")
    with pytest.raises(errors.InvalidOption, match=r"logps='reuse'\): expected one of 'stock', 'chunked'"):
        Options(logps="reuse")


def test_the_plan_has_the_patch_only_if_it_is_asked_for():
    for target in ("grpo", "rloo", "online_dpo", "vllm_generation"):
        assert PATCH not in planned(target, (1, 14, 0), asked_for=())
    asked = Options(logps="chunked").asked_for
    for target, releases in {"grpo": ((0, 18, 0), (1, 14, 2)), "rloo": ((0, 22, 0), (1, 14, 2))}.items():
        for release in releases:
            assert planned(target, release, asked_for=asked)[PATCH] == ""
        assert "in chunks by itself" in planned(target, (1, 15, 0), asked_for=asked)[PATCH]
        assert "in chunks by itself" in planned(target, (1, 16, 0), asked_for=asked)[PATCH]
    assert planned("grpo", (1, 14, 0), asked_for=asked, skip=PATCH)[PATCH] == "left out by skip"


def test_the_cache_keeps_all_texts_apart():
    keys = {
        entry_key(target="grpo", release=(1, 14, 0), upstream_sha256="0", skip=(), rules="", asked_for=asked)
        for asked in ((), (PATCH,), ("old_logps",), (PATCH, "old_logps"))
    }
    assert len(keys) == 4


def test_a_second_call_with_another_value_is_refused(patch_grpo):
    patch_grpo()
    with pytest.raises(errors.OptionsConflict, match=r"\(logps='chunked'\) after PatchFastRL\(logps='stock'"):
        patch_grpo(logps="chunked")
    session.revert()
    patch_grpo(logps="chunked")


def test_the_report_has_a_line_for_each_trainer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "trlpatch.hooks.logps", raising=False)
    assert PatchReport(trl="1.14.0").logps == ()
    monkeypatch.setitem(
        sys.modules, "trlpatch.hooks.logps", SimpleNamespace(describe=lambda: ["GRPOTrainer: 3 passes in chunks"])
    )
    report = PatchReport(trl="1.14.0")
    assert "\nlog-probabilities:\n  GRPOTrainer: 3 passes in chunks" in str(report.full())
    assert report.to_dict()["logps"] == ["GRPOTrainer: 3 passes in chunks"]
