"""The option `old_logps`, from PatchFastRL to the patched text, the cache and the report."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from trlpatch import errors
from trlpatch.options import Options
from trlpatch.rewrite.plan import plan
from trlpatch.runtime import session
from trlpatch.runtime.cache import entry_key
from trlpatch.runtime.report import PatchReport
from trlpatch.source.targets import TARGETS

PATCH = "old_logps"


def planned(
    target: str, release: tuple[int, int, int], *, asked_for: tuple[str, ...], skip: str = ""
) -> dict[str, str]:
    found = plan(TARGETS[target], release, frozenset({skip} - {""}), frozenset(asked_for))
    return {
        **{step.patch.name: "" for step in found.steps},
        **{skipped.patch.name: skipped.reason for skipped in (*found.skips, *found.absent)},
    }


def test_only_reuse_asks_for_the_patch():
    assert Options().asked_for == Options(old_logps="stock").asked_for == ()
    assert Options(old_logps="reuse").asked_for == (PATCH,)
    with pytest.raises(errors.InvalidOption, match="old_logps='on'"):
        Options(old_logps="on")


def test_the_plan_has_the_patch_only_if_it_is_asked_for():
    for target in ("grpo", "rloo", "online_dpo", "vllm_generation"):
        assert PATCH not in planned(target, (1, 16, 0), asked_for=())
    assert [one.name for one in plan(TARGETS["grpo"], (1, 14, 0)).off] == ["logps", PATCH]
    assert [one.name for one in plan(TARGETS["grpo"], (1, 16, 0)).off] == [PATCH]
    assert not plan(TARGETS["vllm_generation"], (1, 16, 0)).off
    asked = Options(old_logps="reuse").asked_for
    assert plan(TARGETS["grpo"], (1, 16, 0), asked_for=frozenset(asked)).off == ()
    assert planned("grpo", (1, 16, 0), asked_for=asked)[PATCH] == ""
    assert planned("rloo", (0, 22, 0), asked_for=asked)[PATCH] == ""
    assert "computes no old log-probabilities" in planned("grpo", (0, 22, 2), asked_for=asked)[PATCH]
    assert planned("grpo", (1, 16, 0), asked_for=asked, skip=PATCH)[PATCH] == "left out by skip"


def test_the_cache_keeps_both_texts_apart():
    stock, reuse = (
        entry_key(target="grpo", release=(1, 16, 0), upstream_sha256="0", skip=(), rules="", asked_for=asked)
        for asked in ((), (PATCH,))
    )
    assert stock != reuse
    assert stock == entry_key(target="grpo", release=(1, 16, 0), upstream_sha256="0", skip=(), rules="")


def test_the_report_names_the_options_that_are_off(patch_grpo):
    assert 'off        old_logps="reuse", logps="chunked", compat="on" (PatchFastRL)' in str(patch_grpo())
    session.revert()
    assert 'off        logps="chunked" (PatchFastRL)' in str(patch_grpo(old_logps="reuse", compat="on"))
    assert "off " not in str(PatchReport(trl="1.16.0")), "nothing is patched"


def test_a_second_call_with_another_value_is_refused(patch_grpo):
    patch_grpo()
    with pytest.raises(errors.OptionsConflict, match=r"old_logps='reuse'\) after PatchFastRL\(old_logps='stock'"):
        patch_grpo(old_logps="reuse")
    session.revert()
    patch_grpo(old_logps="reuse")


def test_the_report_has_a_line_for_each_trainer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "trlpatch.hooks.old_logps", raising=False)
    assert PatchReport(trl="1.16.0").old_logps == ()
    monkeypatch.setitem(
        sys.modules, "trlpatch.hooks.old_logps", SimpleNamespace(describe=lambda: ["GRPOTrainer: the pass runs, why"])
    )
    report = PatchReport(trl="1.16.0")
    assert "old log-probabilities:\n  GRPOTrainer: the pass runs, why" in str(report.full())
    assert report.to_dict()["old_logps"] == ["GRPOTrainer: the pass runs, why"]
