"""What `logps="chunked"` adds to the patched text of every pinned release; the goldens have default options."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import pytest

from tests.golden.optional import has_steps
from trlpatch.rewrite.rewriter import rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from trlpatch.preview import Preview

MARK = "# trlpatch: logps"
FORWARD = "_trlpatch.deferred_logits(self, model)("
LOGPS = "_trlpatch.selective_log_softmax(selective_log_softmax)("
LOGPS_FIRST = "_trlpatch.selective_log_softmax(selective_log_softmax, entropy_from_logits, compute_entropy)("
ENTROPY = "_trlpatch.entropy_from_logits(entropy_from_logits)("
BOTH = "_trlpatch.selective_log_softmax_and_entropy(selective_log_softmax_and_entropy)("


def expected(target: str, release: tuple[int, ...]) -> list[str]:
    """Return the calls that are added to a target's patched text, in order."""
    if target not in ("grpo", "rloo") or release >= (1, 15):
        return []
    if release >= (1, 14):
        return [FORWARD, BOTH, LOGPS]
    if release < (0, 20):
        return [FORWARD, LOGPS]
    return [FORWARD, LOGPS_FIRST, *[ENTROPY] * (2 if target == "grpo" and release >= (1, 8) else 1)]


def test_added_calls(version: str, previewed: Callable[[str], Preview]) -> None:
    found = previewed(version)
    for file in found.files:
        if not has_steps(file, found.install.release, "logps"):
            assert expected(file.source.target.name, found.install.release) == [], file.name
            continue
        asked = rewrite(file.source, found.install.release, asked_for=frozenset({"logps"}))
        assert not asked.failed, file.name
        compared = list(difflib.ndiff(file.rewritten.text.splitlines(), asked.text.splitlines()))
        added = [line[2:].strip() for line in compared if line.startswith("+ ")]
        removed = [line[2:].strip() for line in compared if line.startswith("- ")]
        lines = [line for line in added if line != MARK]
        calls = [line[line.index("_trlpatch") : line.index(")(") + 2] for line in lines]
        assert calls == expected(file.source.target.name, found.install.release), file.name
        assert len(added) - len(lines) == len(removed) == len(calls), file.name
        for old, new, call in zip(removed, lines, calls, strict=True):
            callee = "model" if call == FORWARD else call[len("_trlpatch.") : call.index("(")]
            assert new == old.replace(f"{callee}(", call, 1), file.name


def test_both_options_together(version: str, previewed: Callable[[str], Preview]) -> None:
    """In every file: those that an option leaves as they are must be free of its anchors."""
    found = previewed(version)
    for file in found.files:
        both = rewrite(file.source, found.install.release, asked_for=frozenset({"logps", "old_logps"}))
        assert not both.failed, file.name


def test_a_release_that_chunks_by_itself_says_so(version: str, previewed: Callable[[str], Preview]) -> None:
    found = previewed(version)
    if found.install.release < (1, 15):
        pytest.skip("this release computes the logits of a whole batch")
    for file in found.files:
        if file.source.target.name in ("grpo", "rloo"):
            asked = rewrite(file.source, found.install.release, asked_for=frozenset({"logps"}))
            (outcome,) = (outcome for outcome in asked.outcomes if outcome.patch == "logps")
            assert outcome.status == "skipped"
            assert "in chunks by itself" in outcome.reason
            assert "fused_lm_head=True" in file.source.text
