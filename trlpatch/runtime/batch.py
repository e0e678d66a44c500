"""Batch: the targets of one `PatchFastRL` call, prepared, and what its report and warnings say of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from trlpatch.errors import CacheUnavailable, UntestedRelease
from trlpatch.options import Options
from trlpatch.runtime.fit import Fit, judge_fit
from trlpatch.runtime.module_census import module_census
from trlpatch.runtime.prepare import PatchedTarget, PreparedTargets, prepare_targets
from trlpatch.runtime.report import CacheState, PatchReport
from trlpatch.source.locate import SourceFile, find_trl, left_alone, sources
from trlpatch.trl_names import LEFT_ALONE_REASON

Warned = tuple[type[Warning], str]
"""A warning that is due once the call has done all of its work."""


class Batch(NamedTuple):
    """The targets of one call.

    Attributes:
        found: their sources.
        patched: those that shall run patched.
        fit: which of them stay stock, and why.
        left_alone: trainers of this release that no patch may reach.
    """

    found: Sequence[SourceFile]
    prepared: PreparedTargets
    patched: Sequence[PatchedTarget]
    fit: Fit
    left_alone: Sequence[str]


def prepared_batch(options: Options, new: frozenset[str]) -> Batch:
    """Find the targets `new` and get their patched text.

    Raises:
        PatchError: patches do not fit, and `on_drift` is "raise"; as AnchorDrift or OutputCheckError if it is one.
    """
    install = find_trl()
    found = [source for source in sources(install, options.algorithm, read=False) if source.target.name in new]
    prepared = prepare_targets(install, found, options.skip, options.asked_for)
    fit = judge_fit(install, found, new, prepared.failures, module_census(install))
    # Other modules concern only a call that names no trainer, as other targets do.
    if (fit.failures if options.algorithm else fit.refused) and options.on_drift == "raise":
        from trlpatch.runtime.failures import failure_error

        raise failure_error(fit, prepared.rejected)
    patched = [one for one in prepared.patched if one.source.target.name not in fit.stock]
    return Batch(found, prepared, patched, fit, left_alone(install, new))


def batch_report(batch: Batch, **more: Any) -> PatchReport:
    """Return the report of the call; `more` are the fields that only the session knows."""
    files = {one.source.target.name: str(one.file) for one in batch.patched}
    modules = {one.source.target.name: one.source.module for one in batch.patched}
    states: dict[str, CacheState] = {one.source.target.name: one.cache for one in batch.patched}
    for source in batch.found:
        if source.target.name in batch.fit.stock:
            files[source.target.name] = str(source.path)
            modules[source.target.name] = source.module
            states[source.target.name] = "off"
    entries = [outcome for one in batch.patched for outcome in one.outcomes]
    return PatchReport(
        trl=batch.fit.install.version,
        entries=(*entries, *batch.fit.failures),
        files=files,
        modules=modules,
        cache=states,
        absent=batch.fit.gone,
        **more,
    )


def batch_notes(batch: Batch, pending: list[Warned]) -> tuple[str, ...]:
    """Return the report's notes; what also has to be said at once goes to `pending`."""
    fit, prepared = batch.fit, batch.prepared
    notes = []
    if batch.left_alone:
        notes.append(f"{' and '.join(batch.left_alone)} are left alone: {LEFT_ALONE_REASON}")
    if fit.untested:
        notes.append(fit.untested_line)
        pending.append((UntestedRelease, fit.untested_line))
    if fit.refused:
        from trlpatch.runtime.failures import failure_warnings

        pending += (warned := [*failure_warnings(fit, prepared.rejected)])
        notes += [text.partition("\n")[0] for _, text in warned]
    if prepared.unwritable:
        text = f"the patched text is kept in memory, the cache cannot be used: {prepared.unwritable}"
        notes.append(text)
        pending.append((CacheUnavailable, f"{text}. Set TRLPATCH_CACHE_DIR to a directory of your own."))
    return tuple(notes)
