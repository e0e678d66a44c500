"""Patch session: apply, revert and status; the only module that wires finding, rewriting, caching and loading."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import spec_from_file_location
from typing import TYPE_CHECKING, Any

from trlpatch.errors import (
    AlreadyImported,
    CacheUnavailable,
    DumpUnavailable,
    LeftStock,
    OptionsConflict,
    PatchedTrainersAlive,
    TrainerAlreadyBuilt,
    UntestedRelease,
)
from trlpatch.options import (
    DISABLE,
    DUMP,
    Adapter,
    Colocate,
    OldLogps,
    OnDrift,
    Options,
    Sleep,
    activate,
    read_directory,
    read_switch,
)
from trlpatch.runtime.fit import Fit, judge_fit
from trlpatch.runtime.loader import PatchedFinder, finish_import, running_file
from trlpatch.runtime.module_census import module_census
from trlpatch.runtime.prepare import PatchedTarget, PreparedTargets, prepare_targets
from trlpatch.runtime.report import CacheState, PatchReport
from trlpatch.source.algorithms import require_algorithm
from trlpatch.source.locate import SourceFile, find_trl, left_alone, sources, target_names
from trlpatch.trl_names import LEFT_ALONE_REASON

if TYPE_CHECKING:
    from trlpatch.runtime.undo_journal import UndoJournal

Warned = tuple[type[Warning], str]


@dataclass
class _Session:
    """What is in force in this process."""

    options: Options
    report: PatchReport
    covered: frozenset[str]
    """Targets that calls asked for, whether this release has them or not."""
    stock: frozenset[str] = frozenset()
    """Targets that `on_drift="stock"` left alone."""
    finder: PatchedFinder = field(default_factory=PatchedFinder)
    journals: list[UndoJournal] = field(default_factory=list)
    """What was exchanged in modules that were imported before patching, oldest first."""
    patched: dict[str, PatchedTarget] = field(default_factory=dict)
    """By module name."""
    warned: set[type[Warning]] = field(default_factory=set)


_lock = threading.RLock()
_active: _Session | None = None
_disabled: PatchReport | None = None


def PatchFastRL(
    algorithm: str | None = None,
    FastLanguageModel: object = None,  # noqa: N803
    *,
    colocate: Colocate = "auto",
    sleep: Sleep = "auto",
    adapter: Adapter = "auto",
    old_logps: OldLogps = "stock",
    on_drift: OnDrift = "raise",
    skip: Collection[str] = (),
) -> PatchReport:
    """Patch TRL in this process. Call it before building a trainer, best before importing one.

    Args:
        algorithm: patch only what this trainer needs ("grpo", "RLOO", "online_dpo", ...); None patches every trainer
            that can roll out on vLLM.
        FastLanguageModel: accepted so that calls written for Unsloth work, and ignored: nothing here depends on how
            the model was loaded, only on whether it carries an engine.
        colocate: "auto" uses the engine that a model carries, "always" also colocates the engine TRL builds itself,
            "never" leaves TRL's choice.
        sleep: "auto" follows how the engine was built, "on" requires an engine that can sleep, "off" keeps it awake,
            "kv" is "on" and gives back the KV cache alone. Otherwise weights that the trainer does not share make
            way too, until training was measured to leave room for them.
        adapter: "auto" hands the LoRA adapter to the engine whenever the engine can express it, "request" raises
            where it cannot, "off" keeps TRL's own weight sync.
        old_logps: "reuse" saves GRPO (0.23 and newer) and RLOO the extra forward pass for `old_per_token_logps`: on
            policy, without dropout and without methods overridden, the training forward has the same numbers; in any
            other case the pass runs, and `status()` says why. "stock" always runs it.
        on_drift: "raise" leaves TRL untouched and raises if a patch does not fit this release, "stock" leaves only
            the targets concerned as TRL wrote them and warns. A trainer that has moved to another file does not fit;
            one that is gone from TRL is named in the report, nothing more.
        skip: patches to leave out, by name (`trlpatch list`): a tuple, list or set.

    Returns:
        What was done. The same call again does nothing and returns the same object.

    Raises:
        TrlNotFound: there is no TRL.
        UnsupportedTrl: TRL is older than 0.18.0.
        UnparsableVersion: TRL's version is not PEP 440.
        UnreadableSource: a file of TRL cannot be read or is not UTF-8.
        UnknownAlgorithm: `algorithm` names no trainer that can use vLLM in this TRL, or one that has moved.
        UnknownPatch: `skip` names a patch that does not exist.
        InvalidOption: another argument has a value outside its list or another type, or TRLPATCH_DISABLE is no yes
            or no.
        AnchorDrift: anchors are not where a patch expects them; nothing was changed.
        OutputCheckError: patched text failed a check, the message names the file with it; nothing was changed.
        PatchError: a file is missing, or a module cannot be changed in place; nothing was changed.
        TrainerAlreadyBuilt: a stock trainer exists already; nothing was changed.
        OptionsConflict: an earlier call used another `skip` or `old_logps`.
    """
    named: Any = skip  # Options checks what it is, and keeps it as a tuple.
    return apply(Options(algorithm, colocate, sleep, adapter, on_drift, named, old_logps))


patch = PatchFastRL


def apply(options: Options) -> PatchReport:
    """Do what `PatchFastRL` says, with options already checked. Safe to call from several threads.

    Raises:
        TrlpatchError: as `PatchFastRL` does.
    """
    pending: list[Warned] = []
    with _lock:
        report = _apply(options, pending)
    # After the state is complete: a filter may turn a warning into an exception.
    for category, text in pending:
        warnings.warn(text, category, stacklevel=3)
    return report


def revert() -> None:
    """Return TRL to its own code in this process. Does nothing if it is not patched.

    Classes and functions stay the same objects; modules that were not imported yet are imported from TRL's files.

    Raises:
        PatchError: something else changed the patched modules since; nothing was changed.
    """
    global _active, _disabled
    with _lock:
        _disabled = None
        session, alive = _active, {}
        if session is not None:
            alive = _built(session.patched.values())
            _restore(session)
            _active = None
            activate(Options())
    if alive:
        warnings.warn(
            f"unpatch(): {_counted(alive)} built from patched TRL still exist and now run TRL's own code on an engine "
            "it may not know. Build new trainers.",
            PatchedTrainersAlive,
            stacklevel=2,
        )


unpatch = revert


def status() -> PatchReport | None:
    """Return the report of what is in force, or None before the first `PatchFastRL`."""
    with _lock:
        return _disabled if _active is None else _active.report


def _apply(options: Options, pending: list[Warned]) -> PatchReport:
    global _active, _disabled
    if _active is None and read_switch(DISABLE):
        _disabled = _disabled or PatchReport(disabled=True)
        return _disabled
    _disabled = None
    wanted = target_names(options.algorithm)
    if options.algorithm is not None:
        require_algorithm(find_trl(), options.algorithm)
    session = _active or _Session(options, PatchReport(), frozenset())
    for name in ("skip", "old_logps") if _active is not None else ():
        asked, runs = getattr(options, name), getattr(session.options, name)
        if asked != runs:
            raise OptionsConflict(
                f"PatchFastRL({name}={asked!r}) after PatchFastRL({name}={runs!r}): another set of "
                "patches cannot replace the one that runs. Call trlpatch.unpatch() first."
            )
    retried = session.stock if options.on_drift == "raise" else frozenset()
    new = (wanted - session.covered) | (wanted & retried)
    if _active is None or new:
        _extend(session, options, new, pending)
    session.options = options
    activate(options)
    _active = session
    return session.report


def _extend(session: _Session, options: Options, new: frozenset[str], pending: list[Warned]) -> None:
    """Patch the targets `new` too. Nothing of the session changes if this raises."""
    start = time.perf_counter()
    batch = _prepared(options, new)
    rebound, unfixable = _put_in_place(session, batch.patched)
    session.covered |= new
    session.stock = (session.stock - new) | batch.fit.stock
    session.patched |= {one.source.module: one for one in batch.patched}
    warned: list[Warned] = []
    notes = _notes(batch, warned)
    _warn_early(rebound, unfixable, warned)
    milliseconds = (time.perf_counter() - start) * 1000
    _dump(batch, warned)
    pending += [warning for warning in warned if warning[0] not in session.warned]
    session.warned |= {category for category, _ in warned} - {AlreadyImported, LeftStock}
    report = dataclasses.replace(
        _report(batch), milliseconds=milliseconds, rebound=rebound, unfixable=unfixable, notes=notes
    )
    session.report = session.report.extended_by(report)


@dataclass(frozen=True)
class _Batch:
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


def _prepared(options: Options, new: frozenset[str]) -> _Batch:
    """Find the targets `new` and get their patched text.

    Raises:
        PatchError: patches do not fit, and `on_drift` is "raise"; as AnchorDrift or OutputCheckError if it is one.
    """
    install = find_trl()
    found = [source for source in sources(install, options.algorithm) if source.target.name in new]
    prepared = prepare_targets(install, found, options.skip, options.asked_for)
    fit = judge_fit(install, found, new, prepared.failures, module_census(install))
    # Other modules concern only a call that names no trainer, as other targets do.
    if (fit.failures if options.algorithm else fit.refused) and options.on_drift == "raise":
        from trlpatch.runtime.failures import failure_error

        raise failure_error(fit, prepared.rejected)
    patched = [one for one in prepared.patched if one.source.target.name not in fit.stock]
    return _Batch(found, prepared, patched, fit, left_alone(install, new))


def _report(batch: _Batch) -> PatchReport:
    files = {one.source.target.name: str(one.runs.path) for one in batch.patched}
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
    )


def _put_in_place(session: _Session, patched: Sequence[PatchedTarget]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Install the hook and patch what is imported already; all of it or nothing. Returns names and what is left."""
    changing = [one for one in patched if one.touched]
    before = session.finder.sources
    # The hook first: a module that another thread imports from here on is patched already.
    session.finder.claim({one.source.module: one.module_source for one in changing})
    try:
        early = [one for one in changing if finish_import(one.source.module) and not _runs(one)]
        unfixable = _exchange(session, early) if early else ()
    except BaseException:
        session.finder.restore(before)
        raise
    return tuple(one.source.module for one in early if not one.repairs_imports_only), unfixable


def _exchange(session: _Session, early: Sequence[PatchedTarget]) -> tuple[str, ...]:
    # Imported here and in _restore: a process that patches before importing TRL needs none of it.
    from trlpatch.runtime.rebind import ModuleSwap, prepare_swaps
    from trlpatch.runtime.undo_journal import UndoJournal

    built = _built(early)
    if built:
        raise TrainerAlreadyBuilt(
            f"{_counted(built)} built from stock TRL exist in this process; patching now would leave them half "
            "patched. Nothing was changed. Call trlpatch.PatchFastRL() before building trainers, or delete them "
            "(`del trainer`) and call it again."
        )
    prepared = prepare_swaps([ModuleSwap(one.upstream, one.module_source, one.touched) for one in early])
    journal = UndoJournal()
    prepared.commit(journal)
    session.journals.append(journal)
    return prepared.unfixable


def _runs(one: PatchedTarget) -> bool:
    return running_file(sys.modules[one.source.module]) == str(one.module_source.path)


def _restore(session: _Session) -> None:
    from trlpatch.runtime.rebind import ModuleSwap, prepare_swaps
    from trlpatch.runtime.undo_journal import UndoJournal

    swaps = [
        ModuleSwap(
            one.module_source, one.upstream, one.touched, spec_from_file_location(name, one.source.path), back=True
        )
        for name, one in session.patched.items()
        if one.touched and finish_import(name)
    ]
    prepared = prepare_swaps(swaps)
    session.finder.restore({})
    # The exchange also reaches subclasses that were imported since; the journals then put back, for modules that were
    # patched in place, the very objects that were there.
    prepared.commit(UndoJournal())
    for journal in reversed(session.journals):
        journal.undo()


def _built(patched: Iterable[PatchedTarget]) -> dict[str, int]:
    """Count the live trainers and engines whose classes these targets touch."""
    from trlpatch.runtime.live_objects import instances
    from trlpatch.runtime.rebind import touched_classes

    return instances(
        cls
        for one in patched
        if one.source.target.kind in ("trainer", "engine") and one.source.module in sys.modules
        for cls, _ in touched_classes(sys.modules[one.source.module], one.touched)
    )


def _notes(batch: _Batch, pending: list[Warned]) -> tuple[str, ...]:
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


def _warn_early(rebound: Sequence[str], unfixable: Sequence[str], pending: list[Warned]) -> None:
    if rebound:
        text = f"imported before PatchFastRL and patched in place: {', '.join(rebound)}. Call PatchFastRL() first."
        pending.append((AlreadyImported, "\n".join([text, *(f"out of reach: {line}" for line in unfixable)])))


def _dump(batch: _Batch, pending: list[Warned]) -> None:
    place = read_directory(DUMP)
    if place is None:
        return
    from trlpatch.runtime.dump import dump

    try:
        dump(place, batch.fit.install.version, batch.patched)
    except OSError as error:
        pending.append((DumpUnavailable, f"{DUMP}={place}: {error}"))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
