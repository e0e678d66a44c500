"""Whole plans: transactions on one file, skips, forbidden anchors, output checks."""

from __future__ import annotations

import pytest

from tests.helpers import apply, source
from trlpatch.errors import UnknownPatch
from trlpatch.rewrite import checks, rewriter
from trlpatch.rewrite.outline import outline
from trlpatch.rewrite.plan import plan
from trlpatch.rewrite.rewriter import rewrite
from trlpatch.source.targets import TARGETS

GRPO = """\
\"\"\"GRPO.\"\"\"

from __future__ import annotations

import torch


class GRPOTrainer(_BaseTrainer):
    def __init__(self, model, reward_funcs, args=None, rollout_func=None):
        self.use_vllm, self.vllm_mode = args.use_vllm, args.vllm_mode
        self.rollout_func = rollout_func
        self.vllm_generation = VLLMGeneration(
            model=self.model,
        )
"""


def test_two_patches_on_one_file():
    result = rewrite(source("grpo", GRPO), (1, 16, 0))
    applied = {o.patch for o in result.outcomes if o.status == "applied"}
    assert applied == {"configure", "rollout_func", "sampling"}
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
    assert "_trlpatch.configure(self, model, args)" in result.rejected


IMPORTS = """\
if is_vllm_available():
    from vllm import LLM  # the engine
    from vllm.sampling_params import GuidedDecodingParams

ready = True
"""
HOOKED = IMPORTS.replace(
    "from vllm.sampling_params import GuidedDecodingParams",
    "GuidedDecodingParams = _trlpatch.guided_decoding_params()",
)


@pytest.mark.parametrize(
    ("patched", "finding"),
    [
        (HOOKED, ""),
        (HOOKED.replace("GuidedDecodingParams =", "Guided ="), "no longer binds GuidedDecodingParams"),
        (
            HOOKED.replace("guided_decoding_params()", "guided_decoding_params(ready)"),
            "ready is not used there upstream",
        ),
        (HOOKED.replace("ready = True", "ready = False"), "line 5 changed and calls no hook"),
        (HOOKED.replace("# the engine", ""), "text outside <module> changed"),
        (HOOKED + "more = _trlpatch.given(None)\n", "text outside <module> changed"),
        (HOOKED.replace("if is_vllm", "if not is_vllm"), "text outside <module> changed"),
    ],
)
def test_at_module_level_only_a_hook_may_take_a_statements_place(patched: str, finding: str):
    found = checks.problems(outline(IMPORTS, ()), outline(patched, ()), frozenset({"<module>"}))
    assert [finding in problem for problem in found] == ([True] if finding else []), found


def test_the_module_level_is_closed_to_patches_of_functions():
    line = "outputs = trainer.llm.generate(prompts)\n"
    result = apply("live_adapter", "openenv", "1.4.0", f"{line}\n\ndef helper(trainer):\n    {line}    {line}")
    assert result.touched == ("helper",)
    assert [text.startswith(line) for text in result.text.splitlines(keepends=True)].count(True) == 1


def test_support_files_may_mention_what_belongs_to_trainers():
    text = "from requests.adapters import HTTPAdapter\n\nif __name__ == '__main__':\n    params = SamplingParams()\n"
    result = rewrite(source("vllm_client", text), (1, 4, 0))
    assert [(o.patch, o.status) for o in result.outcomes] == [("without_requests", "applied")]
