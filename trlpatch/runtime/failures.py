"""Failure messages: the error and the lines that tell which patches do not fit, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trlpatch.errors import AnchorDrift, LeftStock, OutputCheckError, PatchError, TrlpatchWarning, UnknownEngineUse
from trlpatch.outcomes import ENGINE_USE, OUTPUT_CHECK, WHOLE_FILE, Drift, Outcome
from trlpatch.runtime.fit import UNKNOWN_USE, Fit
from trlpatch.source.algorithms import algorithms_in
from trlpatch.source.locate import target_names
from trlpatch.source.releases import NEWEST_TESTED, format_release
from trlpatch.versions import installed_version


def failure_error(fit: Fit, rejected: Mapping[str, Path]) -> PatchError:
    """Return one error that lists every failure.

    It is an OutputCheckError if patched text failed a check, an AnchorDrift if all failures are anchors that moved.

    Args:
        rejected: where the text that failed an output check was kept, by target.
    """
    failures = fit.refused
    count = f"{len(fit.failures)} patch{'es do' if len(fit.failures) > 1 else ' does'}"
    stock = 'on_drift="stock" keeps TRL\'s own code for these targets and those coupled to them'
    if not fit.failures:
        stock = 'on_drift="stock" patches all targets and warns of these modules'
    lines = [
        f"{f'{count} not fit' if fit.failures else UNKNOWN_USE} TRL {fit.install.version} ({_where(fit)})",
        describe_all(fit, rejected),
        "",
        f"  effect   TRL is unpatched; {_skip(failures)}{stock}",
        *_one_by_one(fit),
        *_newer(fit),
        "  more     trlpatch check",
    ]
    return _kind(failures)("\n".join(lines))


def failure_warnings(fit: Fit, rejected: Mapping[str, Path]) -> Iterator[tuple[type[TrlpatchWarning], str]]:
    """Yield what to warn of where failures do not raise. The first line of each text says what and where.

    Arguments as for `failure_error`.
    """
    unknown = f"{UNKNOWN_USE} {', '.join(sorted({one.target for one in fit.modules}))}"
    for category, first, failures in (
        (LeftStock, f"left as TRL wrote them: {fit.verdict}", fit.failures),
        (UnknownEngineUse, unknown, fit.modules),
    ):
        if failures:
            yield category, f"{first}\n{_all_described(fit, failures, rejected)}\n  more     trlpatch check"


def describe_all(fit: Fit, rejected: Mapping[str, Path] | None = None) -> str:
    """Return what is known of everything that does not fit, as indented lines. Arguments as for `failure_error`."""
    return _all_described(fit, fit.refused, rejected or {})


def _all_described(fit: Fit, failures: Sequence[Outcome], rejected: Mapping[str, Path]) -> str:
    return "\n\n".join("\n".join(_described(fit, failure, rejected)) for failure in failures)


def _where(fit: Fit) -> str:
    targets = [f"targets {', '.join(sorted(fit.failed))}"] if fit.failed else []
    modules = [f"modules {', '.join(sorted({one.target for one in fit.modules}))}"] if fit.modules else []
    return "; ".join([*targets, *modules])


def _kind(failures: Sequence[Outcome]) -> type[PatchError]:
    if any(failure.patch == OUTPUT_CHECK for failure in failures):
        return OutputCheckError
    return AnchorDrift if all(failure.drift is not None for failure in failures) else PatchError


def _skip(failures: Sequence[Outcome]) -> str:
    names = tuple(sorted({failure.patch for failure in failures} - {WHOLE_FILE, OUTPUT_CHECK, ENGINE_USE}))
    return f"skip={names!r} leaves {'these' if len(names) > 1 else 'this patch'} out; " if names else ""


def _one_by_one(fit: Fit) -> Iterator[str]:
    """Yield how to patch a single trainer whose targets fit, where there is one."""
    fine = [name for name in algorithms_in(fit.install) if target_names(name).isdisjoint(fit.failed)]
    if fine:
        one = "grpo" if "grpo" in fine else fine[0]
        yield f'  one      PatchFastRL("{one}") patches what one trainer needs; these fit: {", ".join(fine)}'


def _newer(fit: Fit) -> Iterator[str]:
    if fit.untested:
        mine, newest = installed_version("trlpatch") or "", format_release(NEWEST_TESTED)
        yield f"  newer    trlpatch {mine} was tested up to TRL {newest}; a later one: pip install -U trlpatch"


def _described(fit: Fit, failure: Outcome, rejected: Mapping[str, Path]) -> Iterator[str]:
    yield f"  patch    {failure.patch} on {failure.target} of TRL {fit.install.version}"
    drift = failure.drift
    if drift is None:
        yield f"  reason   {failure.reason}"
    elif failure.patch == OUTPUT_CHECK:
        yield from _output_check(failure, drift, rejected.get(failure.target))
    elif failure.patch == ENGINE_USE:
        yield from _engine_use(failure, drift)
    else:
        yield from _anchor(failure, drift)
        if failure.target in fit.moved:
            yield f"  moved    {fit.moved[failure.target]}"


def _anchor(failure: Outcome, drift: Drift) -> Iterator[str]:
    counts = f"{drift.anchor}: expected {drift.expected}, found {drift.found}"
    nearest = f";  nearest: line {drift.lookalike}" if drift.lookalike else ""
    yield f"  file     {drift.file}:{drift.line}"
    yield f"  method   {drift.qualname}"
    yield f"  anchor   {failure.reason or counts}{nearest}"


def _engine_use(failure: Outcome, drift: Drift) -> Iterator[str]:
    what, _, advice = failure.reason.partition("; ")
    yield f"  file     {drift.file}:{drift.line}, in {drift.qualname}"
    yield f"  line     {drift.lookalike.partition(': ')[2]}"
    yield f"  found    {what}"
    yield f"  do       {advice}"


def _output_check(failure: Outcome, drift: Drift, rejected: Path | None) -> Iterator[str]:
    yield f"  file     {drift.file}"
    yield f"  check    {failure.reason}"
    if rejected is not None:
        yield f"  rejected {rejected}"
        yield f"  compare  diff -u {drift.file} {rejected}"
