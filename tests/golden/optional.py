"""Optional patches, which the goldens are without: which files one changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trlpatch.rewrite.plan import plan

if TYPE_CHECKING:
    from trlpatch.preview import FilePreview
    from trlpatch.source.releases import Release


def has_steps(file: FilePreview, release: Release, *names: str) -> bool:
    """Whether the optional patches `names` add steps to the plan of a file: without, its text is what it is anyway."""
    return plan(file.source.target, release, asked_for=frozenset(names)).steps != file.plan.steps
