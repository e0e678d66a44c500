"""Before-and-after checks for single patches, on small sources in the shape of TRL's."""

from __future__ import annotations

import ast
from pathlib import Path
from textwrap import dedent

from trlpatch.rewrite.patch import Patch
from trlpatch.rewrite.plan import Plan, Step
from trlpatch.rewrite.registry import patches
from trlpatch.rewrite.rewriter import Rewritten, apply_plan
from trlpatch.source.locate import SourceFile
from trlpatch.source.releases import parse_release
from trlpatch.source.targets import TARGETS

HEADER = "# trlpatch: hooks\nimport trlpatch.hooks as _trlpatch\n\n"

TINY = frozenset({"configure", "sampling_config"})
"""The patches of trainers that the tiny one of tests/runtime has code for: it has no engine and needs no repair."""


def _of_trainers(patch: Patch) -> bool:
    return any(TARGETS[target].kind != "support" for target in patch.targets)


SKIP = tuple(sorted({patch.name for patch in patches() if _of_trainers(patch)} - TINY))


def source(target: str, text: str) -> SourceFile:
    """Return a source file of `target` with the given text."""
    return SourceFile(TARGETS[target], Path("upstream.py"), f"trl.{target}", text)


def apply(patch: str, target: str, trl: str, text: str) -> Rewritten:
    """Apply one patch in its variant for TRL release `trl`."""
    found = next(p for p in patches() if p.name == patch)
    variant = found.variant(target, parse_release(trl))
    assert variant is not None, f"{patch} has no variant for {target} in {trl}"
    return apply_plan(source(target, dedent(text)), Plan(target, (Step(found, variant),), ()))


def check_patched(patch: str, target: str, trl: str, before: str, after: str) -> None:
    """Assert that the patch turns `before` into `after`; the import line is added here."""
    ast.parse(dedent(after))
    result = apply(patch, target, trl, before)
    assert [o.reason for o in result.failed] == []
    assert result.text == HEADER + dedent(after)


def check_drift(patch: str, target: str, trl: str, text: str, reason: str, lookalike: str = "") -> None:
    """Assert that the patch refuses `text` for `reason`, shows `lookalike`, and leaves the text alone."""
    result = apply(patch, target, trl, text)
    assert [o.reason for o in result.failed] == [reason]
    drift = result.failed[0].drift
    assert drift is not None
    assert lookalike in drift.lookalike
    assert result.text == dedent(text)
    assert result.touched == ()
