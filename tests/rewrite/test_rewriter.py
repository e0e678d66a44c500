"""Whole plans: transactions on one file, skips, forbidden anchors, output checks."""

from __future__ import annotations

import pytest

from tests.helpers import source
from trlpatch.errors import UnknownPatch
from trlpatch.rewrite import checks, rewriter
from trlpatch.rewrite.plan import plan
from trlpatch.rewrite.regions import outline
from trlpatch.rewrite.rewriter import rewrite
from trlpatch.source.targets import TARGETS

GRPO = """\
\"\"\"GRPO.\"\"\"

from __future__ import annotations

import torch


class GRPOTrainer(_BaseTrainer):
    def __init__(self, model, reward_funcs, args=None):
        self.vllm_generation = VLLMGeneration(
            model=self.model,
        )
"""


def test_two_patches_on_one_file():
    result = rewrite(source("grpo", GRPO), (1, 16, 0))
    applied = {o.patch for o in result.outcomes if o.status == "applied"}
    assert applied == {"configure", "sampling"}
    assert result.touched == ("GRPOTrainer.__init__",)
    assert result.text.index("import trlpatch.hooks as _trlpatch") < result.text.index("import torch")
    assert result.text.index("__future__") < result.text.index("import trlpatch")


def test_what_is_declared_to_live_elsewhere_must_not_be_here():
    moved_back = GRPO + "\n    def _generate(self):\n        return self.llm.generate(self.prompts)\n"
    result = rewrite(source("grpo", moved_back), (1, 17, 0))
    reasons = [o.reason for o in result.failed]
    assert "rollout_call: expected 0, because rollouts run in VLLMGeneration, found one" in reasons
    assert result.text == moved_back


def test_one_drift_leaves_the_whole_file_alone():
    result = rewrite(source("grpo", GRPO.replace("args=None", "arguments=None")), (1, 16, 0))
    assert [o.patch for o in result.failed] == ["configure"]
    assert "_trlpatch" not in result.text


def test_leaving_out_one_half_of_a_pair_leaves_out_the_other():
    skipped = {s.patch.name: s.reason for s in plan(TARGETS["vllm_generation"], (1, 9, 2), frozenset({"sleep"})).skips}
    assert skipped["sleep"] == "left out by skip"
    assert skipped["adapter_sync"].startswith("needs ")
    assert skipped["live_adapter"].startswith("needs ")


def test_an_unknown_patch_cannot_be_left_out():
    with pytest.raises(UnknownPatch, match=r"\['slep'\].*Known: adapter_sync"):
        rewrite(source("grpo", GRPO), (1, 16, 0), skip=frozenset({"slep"}))


@pytest.mark.parametrize(
    ("patched", "finding"),
    [
        (GRPO.replace("import torch", "import torch, os"), "text outside GRPOTrainer.__init__ changed"),
        (GRPO.replace("model=self.model", "model=self.model, engine=engine"), "engine is not bound there"),
        (GRPO.replace("args=None", "args=()"), "the signature changed"),
    ],
)
def test_output_checks_find_what_an_edit_must_not_do(patched: str, finding: str):
    upstream, after = (outline(text, ("GRPOTrainer",)) for text in (GRPO, patched))
    found = checks.problems(upstream, after, frozenset({"GRPOTrainer.__init__"}))
    assert any(finding in problem for problem in found), found


def test_a_lost_comment_is_found():
    commented = GRPO.replace("        self.vllm", "        # keep me\n        self.vllm")
    found = checks.problems(
        outline(commented, ("GRPOTrainer",)), outline(GRPO, ("GRPOTrainer",)), frozenset({"GRPOTrainer.__init__"})
    )
    assert found == ["GRPOTrainer.__init__: comments were lost: # keep me"]


def test_a_failed_output_check_keeps_upstreams_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rewriter, "problems", lambda *_: ["broken on purpose"])
    result = rewrite(source("grpo", GRPO), (1, 16, 0))
    assert [o.reason for o in result.failed] == ["broken on purpose"]
    assert result.text == GRPO
