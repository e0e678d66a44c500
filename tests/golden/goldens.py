"""What golden/<release>/ holds, computed from the rewriter and compared with what is on disk."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.golden.sources import ROOT

if TYPE_CHECKING:
    from trlpatch.preview import FilePreview, Preview

GOLDEN = ROOT / "golden"
FORMAT = 1
CONTEXT_LINES = 2
SHOWN_LINES = 60
MANIFEST = "manifest.json"
UPDATE = "pytest tests/golden --golden-update"


def render(preview: Preview) -> dict[str, str]:
    """Return the golden files of one release by name: its manifest, and one diff per TRL file that changes."""
    manifest = {
        "format": FORMAT,
        "trl": preview.install.version,
        "files": {file.name: _entry(file) for file in sorted(preview.files, key=lambda file: file.name)},
    }
    golden = {MANIFEST: json.dumps(manifest, indent=1) + "\n"}
    for file in preview.files:
        if diff := file.diff(CONTEXT_LINES):
            golden[diff_name(file.name)] = diff
    return golden


def diff_name(file: str) -> str:
    """Return `trainer.grpo_trainer.diff` for `trl/trainer/grpo_trainer.py`."""
    return file.removeprefix("trl/").removesuffix(".py").replace("/", ".") + ".diff"


def _entry(file: FilePreview) -> dict[str, Any]:
    outcomes = file.rewritten.outcomes
    return {
        "target": file.source.target.name,
        "upstream_sha256": file.source.sha256,
        "patched_sha256": file.rewritten.sha256,
        "plan": [f"{step.patch.name}@{step.variant.trl}" for step in file.plan.steps],
        "anchors": {o.patch: dict(sorted(o.anchors.items())) for o in outcomes if o.status == "applied"},
        "touched": list(file.rewritten.touched),
        "skipped": {skip.patch.name: skip.reason for skip in file.plan.skips},
    }


def findings(version: str, rendered: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with golden/<version>/, the cause before its consequences."""
    directory = GOLDEN / version
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in sorted(directory.glob("*"))}
    yield from _foreign_sources(on_disk.get(MANIFEST), rendered[MANIFEST])
    for name in sorted(rendered.keys() - on_disk.keys()):
        yield f"missing: golden/{version}/{name}"
    for name in sorted(on_disk.keys() - rendered.keys()):
        yield f"orphan: golden/{version}/{name} belongs to no patched file"
    for name in sorted(rendered.keys() & on_disk.keys()):
        if rendered[name] != on_disk[name]:
            yield f"stale: golden/{version}/{name}\n{_excerpt(on_disk[name], rendered[name])}"


def _foreign_sources(golden: str | None, rendered: str) -> Iterator[str]:
    pinned = json.loads(golden)["files"] if golden else {}
    for name, entry in json.loads(rendered)["files"].items():
        expected = pinned.get(name, entry)["upstream_sha256"]
        if entry["upstream_sha256"] != expected:
            yield (
                f"upstream source is not the pinned one: {name} has sha256 {entry['upstream_sha256']}, the golden was "
                f"made from {expected}. What follows is a consequence."
            )


def _excerpt(golden: str, rendered: str) -> str:
    lines = list(difflib.unified_diff(golden.splitlines(), rendered.splitlines(), "golden", "now", n=1, lineterm=""))
    more = [f"... and {len(lines) - SHOWN_LINES} lines more"] if len(lines) > SHOWN_LINES else []
    return "\n".join(lines[:SHOWN_LINES] + more)


def write(version: str, rendered: dict[str, str]) -> None:
    """Make golden/<version>/ hold exactly `rendered`."""
    directory = GOLDEN / version
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if path.name not in rendered:
            path.unlink()
    for name, text in rendered.items():
        Path(directory / name).write_text(text, encoding="utf-8", newline="\n")
