"""What `old_logps="reuse"` adds to the patched text of every pinned release; the goldens have default options."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import pytest

from tests.golden.optional import has_steps
from trlpatch.rewrite.rewriter import rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from trlpatch.preview import Preview

MARK = "# trlpatch: old_logps"
OLD = "_trlpatch.old_logps(self, self._get_per_token_logps_and_entropies)("
CORRECTION = "if self.use_vllm and self.vllm_importance_sampling_correction and old_per_token_logps is not None:"
AT_GENERATION = [MARK, OLD, MARK, CORRECTION, MARK, CORRECTION, MARK, CORRECTION]
IN_BATCH = [MARK, "_trlpatch.keep_sampling_logps(output, old_per_token_logps, sampling_per_token_logps)"]
IN_LOSS = [MARK, "_trlpatch.importance_sampling_ratio(self, inputs, per_token_logps)"]
SUM = (
    "old_logps = None if old_per_token_logps is None else (old_per_token_logps * completion_mask).sum(1)"
    "  # mask out padding and tokens after EOS"
)
RLOO = [MARK, OLD, MARK, SUM, MARK, "old_logps = _trlpatch.old_sequence_logps(self, inputs, logps)"]


def expected(target: str, release: tuple[int, ...]) -> list[str]:
    """Return the lines that are added to a target's patched text."""
    if target == "rloo":
        return RLOO
    if target != "grpo" or release < (0, 23):
        return []
    return [*AT_GENERATION, *(IN_BATCH if release < (0, 27, 1) else []), *IN_LOSS]


def test_added_lines(version: str, previewed: Callable[[str], Preview]) -> None:
    found = previewed(version)
    for file in found.files:
        if not has_steps(file, found.install.release, "old_logps"):
            assert expected(file.source.target.name, found.install.release) == [], file.name
            continue
        asked = rewrite(file.source, found.install.release, asked_for=frozenset({"old_logps"}))
        assert not asked.failed
        compared = difflib.ndiff(file.rewritten.text.splitlines(), asked.text.splitlines())
        changed = [line for line in compared if line[:2] in ("+ ", "- ")]
        added = [line[2:].strip() for line in changed if line.startswith("+")]
        lines = [OLD if line.endswith(OLD) else line for line in added]
        assert lines == expected(file.source.target.name, found.install.release), file.name
        assert len(changed) - len(added) == sum(line != MARK and not line.startswith("_") for line in added), file.name


def test_a_release_without_old_logps_says_so(version: str, previewed: Callable[[str], Preview]) -> None:
    found = previewed(version)
    if found.install.release >= (0, 23):
        pytest.skip("this release computes old log-probabilities")
    (grpo,) = (file for file in found.files if file.source.target.name == "grpo")
    asked = rewrite(grpo.source, found.install.release, asked_for=frozenset({"old_logps"}))
    (outcome,) = (outcome for outcome in asked.outcomes if outcome.patch == "old_logps")
    assert (outcome.status, outcome.reason[:10]) == ("skipped", "on-policy,")
