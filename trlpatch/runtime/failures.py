"""Failure messages: the error and the lines that tell which patches do not fit, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trlpatch.errors import AnchorDrift, OutputCheckError, PatchError
from trlpatch.outcomes import OUTPUT_CHECK, WHOLE_FILE, Drift, Outcome
from trlpatch.source.locate import TrlInstall


def failure_error(install: TrlInstall, failures: Sequence[Outcome], rejected: Mapping[str, Path]) -> PatchError:
    """Return one error that lists every failure.

    It is an OutputCheckError if patched text failed a check, an AnchorDrift if all failures are anchors that moved.

    Args:
        rejected: where the text that failed an output check was kept, by target.
    """
    described = "\n\n".join(describe(install, failure, rejected) for failure in failures)
    targets = sorted({failure.target for failure in failures})
    skippable = tuple(sorted({failure.patch for failure in failures} - {WHOLE_FILE, OUTPUT_CHECK}))
    skip = f"skip={skippable!r} leaves {'these' if len(skippable) > 1 else 'this patch'} out; " if skippable else ""
    text = (
        f"{len(failures)} patch{'es do' if len(failures) > 1 else ' does'} not fit TRL {install.version} "
        f"(targets {', '.join(targets)})\n{described}\n\n"
        f"  effect   TRL is unpatched; {skip}"
        'on_drift="stock" keeps TRL\'s own code for these targets and those coupled to them\n'
        "  more     trlpatch check"
    )
    return _kind(failures)(text)


def _kind(failures: Sequence[Outcome]) -> type[PatchError]:
    if any(failure.patch == OUTPUT_CHECK for failure in failures):
        return OutputCheckError
    return AnchorDrift if all(failure.drift is not None for failure in failures) else PatchError


def describe(install: TrlInstall, failure: Outcome, rejected: Mapping[str, Path] | None = None) -> str:
    """Return what is known of one failure, as indented lines. Arguments as for `failure_error`."""
    head = f"  patch    {failure.patch} on {failure.target} of TRL {install.version}"
    drift = failure.drift
    if drift is None:
        lines = [f"  reason   {failure.reason}"]
    elif failure.patch == OUTPUT_CHECK:
        lines = _output_check(failure, drift, (rejected or {}).get(failure.target))
    else:
        lines = _anchor(failure, drift)
    return "\n".join([head, *lines])


def _anchor(failure: Outcome, drift: Drift) -> list[str]:
    counts = f"{drift.anchor}: expected {drift.expected}, found {drift.found}"
    nearest = f";  nearest: line {drift.lookalike}" if drift.lookalike else ""
    return [
        f"  file     {drift.file}:{drift.line}",
        f"  method   {drift.qualname}",
        f"  anchor   {failure.reason or counts}{nearest}",
    ]


def _output_check(failure: Outcome, drift: Drift, rejected: Path | None) -> list[str]:
    lines = [f"  file     {drift.file}", f"  check    {failure.reason}"]
    if rejected is not None:
        lines += [f"  rejected {rejected}", f"  compare  diff -u {drift.file} {rejected}"]
    return lines
