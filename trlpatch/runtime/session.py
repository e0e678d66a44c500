"""Apply, revert, status: the only module that wires finding, rewriting, caching, loading and in-place patching."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
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
    OnDrift,
    Options,
    Sleep,
    activate,
    read_directory,
    read_switch,
)
from trlpatch.runtime import collect as collecting
from trlpatch.runtime.collect import Collected, Patched
from trlpatch.runtime.loader import PatchedFinder, finish_import, running_file
from trlpatch.runtime.report import PatchReport
from trlpatch.source.locate import TrlInstall, find_trl, missing, sources, target_names
from trlpatch.source.releases import NEWEST_TESTED, format_release

if TYPE_CHECKING:
    from trlpatch.runtime.assign import Journal

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
    journals: list[Journal] = field(default_factory=list)
    """What was exchanged in modules that were imported before patching, oldest first."""
    patched: dict[str, Patched] = field(default_factory=dict)
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
    on_drift: OnDrift = "raise",
    skip: Iterable[str] = (),
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
        on_drift: "raise" leaves TRL untouched and raises if a patch does not fit this release, "stock" leaves only
            the targets concerned as TRL wrote them and warns.
        skip: patches to leave out, by name (`trlpatch list`).

    Returns:
        What was done. The same call again does nothing and returns the same object.

    Raises:
        TrlNotFound, UnsupportedTrl, UnparsableVersion: there is no TRL that can be patched.
        UnknownAlgorithm, UnknownPatch, InvalidOption: an argument names nothing, or TRLPATCH_DISABLE is no yes or no.
        AnchorDrift, PatchError: patches do not fit; nothing was changed.
        TrainerAlreadyBuilt: a stock trainer exists already; nothing was changed.
        OptionsConflict: an earlier call used another `skip`.
    """
    named: Any = tuple(skip) if not isinstance(skip, str) else skip
    return apply(Options(algorithm, colocate, sleep, adapter, on_drift, named))


patch = PatchFastRL


def apply(options: Options) -> PatchReport:
    """Do what `PatchFastRL` says, with options already checked. Safe to call from several threads."""
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
    session = _active or _Session(options, PatchReport(), frozenset())
    if _active is not None and options.skip != session.options.skip:
        raise OptionsConflict(
            f"PatchFastRL(skip={options.skip!r}) after PatchFastRL(skip={session.options.skip!r}): another set of "
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
    start = time.perf_counter()
    install = find_trl()
    found = [source for source in sources(install, options.algorithm) if source.target.name in new]
    absent = [(target, path) for target, path in missing(install, options.algorithm) if target.name in new]
    collected = collecting.collect(install, found, absent, options.skip)
    if collected.failures and options.on_drift == "raise":
        raise collecting.drift_error(install, collected.failures)
    stock = collecting.stock_targets(collected.failures, found) if collected.failures else frozenset()
    patched = [one for one in collected.patched if one.source.target.name not in stock]
    early, unfixable = _put_in_place(session, patched)
    session.covered |= new
    session.stock = (session.stock - new) | stock
    session.patched |= {one.source.module: one for one in patched}
    warned: list[Warned] = []
    notes = _notes(install, collected, stock, early, unfixable, warned)
    stocked = [source for source in found if source.target.name in stock]
    milliseconds = (time.perf_counter() - start) * 1000
    _dump(install, patched, warned)
    pending += [warning for warning in warned if warning[0] not in session.warned]
    session.warned |= {category for category, _ in warned} - {AlreadyImported, LeftStock}
    session.report = _merged(
        session.report,
        PatchReport(
            trl=install.version,
            entries=(
                *(entry for one in patched for entry in one.entries),
                *(failure.entry for failure in collected.failures),
            ),
            files={one.source.target.name: str(one.runs.path) for one in patched}
            | {source.target.name: str(source.path) for source in stocked},
            modules={one.source.target.name: one.source.module for one in patched}
            | {source.target.name: source.module for source in stocked},
            cache={one.source.target.name: one.cache for one in patched}
            | {source.target.name: "off" for source in stocked},
            milliseconds=milliseconds,
            rebound=early,
            unfixable=unfixable,
            notes=notes,
        ),
    )


def _put_in_place(session: _Session, patched: Sequence[Patched]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Install the hook and patch what is imported already; all of it or nothing. Returns names and what is left."""
    changing = [one for one in patched if one.touched]
    before = session.finder.executables
    # The hook first: a module that another thread imports from here on is patched already.
    session.finder.claim({one.source.module: one.executable for one in changing})
    try:
        early = [one for one in changing if finish_import(one.source.module) and not _runs(one)]
        unfixable = _exchange(session, early) if early else ()
    except BaseException:
        session.finder.restore(before)
        raise
    return tuple(one.source.module for one in early if not one.repairs_imports_only), unfixable


def _exchange(session: _Session, early: Sequence[Patched]) -> tuple[str, ...]:
    # Imported here and in _restore: a process that patches before importing TRL needs none of it.
    from trlpatch.runtime.assign import Journal
    from trlpatch.runtime.rebind import Move, prepare

    built = _built(early)
    if built:
        raise TrainerAlreadyBuilt(
            f"{_counted(built)} built from stock TRL exist in this process; patching now would leave them half "
            "patched. Nothing was changed. Call trlpatch.PatchFastRL() before building trainers, or delete them "
            "(`del trainer`) and call it again."
        )
    prepared = prepare([Move(one.upstream, one.executable, one.touched) for one in early])
    journal = Journal()
    prepared.commit(journal)
    session.journals.append(journal)
    return prepared.unfixable


def _runs(one: Patched) -> bool:
    return running_file(sys.modules[one.source.module]) == str(one.executable.path)


def _restore(session: _Session) -> None:
    from trlpatch.runtime.assign import Journal
    from trlpatch.runtime.rebind import Move, prepare

    moves = [
        Move(one.executable, one.upstream, one.touched, spec_from_file_location(name, one.source.path), back=True)
        for name, one in session.patched.items()
        if one.touched and finish_import(name)
    ]
    prepared = prepare(moves)
    session.finder.restore({})
    # The exchange also reaches subclasses that were imported since; the journals then put back, for modules that were
    # patched in place, the very objects that were there.
    prepared.commit(Journal())
    for journal in reversed(session.journals):
        journal.undo()


def _built(patched: Iterable[Patched]) -> dict[str, int]:
    """Count the live trainers and engines whose classes these targets touch."""
    from trlpatch.runtime.live import instances
    from trlpatch.runtime.rebind import touched_classes

    return instances(
        cls
        for one in patched
        if one.source.target.kind in ("trainer", "engine") and one.source.module in sys.modules
        for cls, _ in touched_classes(sys.modules[one.source.module], one.touched)
    )


def _notes(
    install: TrlInstall,
    collected: Collected,
    stock: frozenset[str],
    early: Sequence[str],
    unfixable: Sequence[str],
    pending: list[Warned],
) -> tuple[str, ...]:
    notes = list(collected.absent)
    if install.release > NEWEST_TESTED:
        text = (
            f"untested release: TRL {install.version} is newer than {format_release(NEWEST_TESTED)}; every anchor "
            "was found where it was expected" + (" except where this report says failed" if stock else "")
        )
        notes.append(text)
        pending.append((UntestedRelease, text))
    if stock:
        failed = "\n".join(collecting.describe(install, failure) for failure in collected.failures)
        text = f"left as TRL wrote them because patches do not fit: {', '.join(sorted(stock))}"
        notes.append(text)
        pending.append((LeftStock, f"{text}\n{failed}\n  more     trlpatch check"))
    if collected.unwritable:
        text = f"the patched text is kept in memory, the cache cannot be used: {collected.unwritable}"
        notes.append(text)
        pending.append((CacheUnavailable, f"{text}. Set TRLPATCH_CACHE_DIR to a directory of your own."))
    if early:
        text = f"imported before PatchFastRL and patched in place: {', '.join(early)}. Call PatchFastRL() first."
        pending.append((AlreadyImported, "\n".join([text, *(f"out of reach: {line}" for line in unfixable)])))
    return tuple(notes)


def _dump(install: TrlInstall, patched: Sequence[Patched], pending: list[Warned]) -> None:
    place = read_directory(DUMP)
    if place is None:
        return
    try:
        collecting.dump(place, install.version, patched)
    except OSError as error:
        pending.append((DumpUnavailable, f"{DUMP}={place}: {error}"))


def _merged(before: PatchReport, now: PatchReport) -> PatchReport:
    again = set(now.files)
    return dataclasses.replace(
        now,
        entries=(*(entry for entry in before.entries if entry.target not in again), *now.entries),
        files={**before.files, **now.files},
        modules={**before.modules, **now.modules},
        cache={**before.cache, **now.cache},
        milliseconds=before.milliseconds + now.milliseconds,
        rebound=(*before.rebound, *now.rebound),
        unfixable=(*before.unfixable, *now.unfixable),
        notes=tuple(dict.fromkeys((*before.notes, *now.notes))),
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
