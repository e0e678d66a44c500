"""Patch session: apply, revert and status; the only module that wires finding, rewriting, caching and loading."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Sequence
from importlib.util import spec_from_file_location
from typing import TYPE_CHECKING, Any

from trlpatch.errors import (
    AlreadyImported,
    DumpUnavailable,
    LeftStock,
    OptionsConflict,
    PatchedTrainersAlive,
    TrainerAlreadyBuilt,
    UnknownArgument,
)
from trlpatch.options import (
    DISABLE,
    DUMP,
    Adapter,
    Colocate,
    Compat,
    Logps,
    LoraLayers,
    OldLogps,
    OnDrift,
    Options,
    Sleep,
    activate,
    active,
    read_directory,
    read_switch,
)
from trlpatch.runtime import compat as removed_arguments
from trlpatch.runtime.batch import Batch, Warned, batch_notes, batch_report, prepared_batch
from trlpatch.runtime.loader import PatchedFinder, finish_import, running_file
from trlpatch.runtime.prepare import PatchedTarget
from trlpatch.runtime.report import PatchReport
from trlpatch.source.algorithms import require_algorithm
from trlpatch.source.locate import find_trl, target_names

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Never

    from trlpatch.runtime.undo_journal import UndoJournal


class _Session:
    """What is in force in this process.

    Attributes:
        covered: targets that calls asked for, whether this release has them or not.
        stock: targets that `on_drift="stock"` left alone.
        journals: what was exchanged in modules that were imported before patching, oldest first.
        patched: by module name.
        caller: who asked for `options`, in the words of a script.
    """

    def __init__(self, options: Options, caller: str) -> None:
        self.options = options
        self.caller = caller
        self.report = PatchReport()
        self.covered: frozenset[str] = frozenset()
        self.stock: frozenset[str] = frozenset()
        self.finder = PatchedFinder()
        self.journals: list[UndoJournal] = []
        self.patched: dict[str, PatchedTarget] = {}
        self.warned: set[type[Warning]] = set()


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
    logps: Logps = "stock",
    old_logps: OldLogps = "stock",
    lora_layers: LoraLayers = "auto",
    compat: Compat | None = None,
    on_drift: OnDrift = "raise",
    skip: Collection[str] = (),
    **unknown: Never,
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
        adapter: "auto" hands the LoRA adapter to the engine whenever the engine can express it, else writes the merged
            weights into an engine on a CPU in place, else lets TRL push them; "request" raises where it cannot be
            expressed; "merge" writes weights in place always, on a GPU too, or raises; "off" keeps TRL's own sync.
        logps: "chunked" computes log-probabilities without the logits of a whole batch, or `status()` says why not.
        old_logps: "reuse" saves GRPO (0.23 and newer) and RLOO the extra forward pass for `old_per_token_logps`: on
            policy, without dropout and without methods overridden, the training forward has the same numbers; in any
            other case the pass runs, and `status()` says why. "stock" always runs it.
        lora_layers: the LoRA layers of engines that TRL builds. "auto": those of trlpatch, for one adapter, where they
            fit, else vLLM's; "trlpatch": an error where they do not; "vllm": always vLLM's.
        compat: "on" accepts arguments that this TRL and transformers took away (`warmup_ratio`, `max_prompt_length`,
            `SFTTrainer(tokenizer=)`, ...: docs/compat.md) and does what they did; "off" explains upstream's error.
            None: as an earlier call said, else "off".
        on_drift: "raise" leaves TRL untouched and raises if a patch does not fit this release, "stock" leaves only
            the targets concerned as TRL wrote them and warns. A trainer that has moved to another file does not fit;
            one that is gone from TRL is named in the report, nothing more.
        skip: patches to leave out, by name (`trlpatch list`): a tuple, list or set.
        unknown: refused, in words of ours.

    Returns:
        What was done. The same call again does nothing and returns the same object.

    Raises:
        TrlNotFound: there is no TRL.
        UnsupportedTrl: TRL is older than 0.18.0.
        UnparsableVersion: TRL's version is not PEP 440.
        UnreadableSource: a file of TRL cannot be read or is not UTF-8.
        UnknownAlgorithm: `algorithm` names no trainer that can use vLLM in this TRL, or one that has moved.
        UnknownPatch: `skip` names a patch that does not exist.
        UnknownArgument: there is no such option.
        InvalidOption: another argument has a value outside its list or another type, or TRLPATCH_DISABLE is no yes
            or no.
        AnchorDrift: anchors are not where a patch expects them; nothing was changed.
        OutputCheckError: patched text failed a check, the message names the file with it; nothing was changed.
        PatchError: a file is missing, or a module cannot be changed in place; nothing was changed.
        TrainerAlreadyBuilt: a stock trainer exists already; nothing was changed.
        OptionsConflict: an earlier call used another `skip`, `logps` or `old_logps`.
    """
    if unknown:
        raise _unknown_option(next(iter(unknown)))
    named: Any = skip  # Options checks what it is, and keeps it as a tuple.
    # PatchFastRL("GRPO", FastLanguageModel) of a notebook, after one with compat="on", must not take it back unsaid.
    said = active().compat if compat is None else compat
    return apply(Options(algorithm, colocate, sleep, adapter, on_drift, named, old_logps, lora_layers, logps, said))


patch = PatchFastRL


def _unknown_option(name: str) -> UnknownArgument:
    import difflib  # for messages alone

    known = list(vars(Options()))
    close = "".join(f"; did you mean {one}=?" for one in difflib.get_close_matches(name, known, n=1))
    said = f"PatchFastRL({name}=...): there is no such option{close or '.'}"
    return UnknownArgument(f"{said} It has {', '.join(known)}.")


def apply(options: Options, *, caller: str = "PatchFastRL") -> PatchReport:
    """Do what `PatchFastRL` says, with options already checked. Safe to call from several threads.

    Args:
        options: what is asked for.
        caller: who asks, for messages.

    Raises:
        TrlpatchError: as `PatchFastRL` does.
    """
    pending: list[Warned] = []
    with _lock:
        report = _apply(options, caller, pending)
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
            with removed_arguments.undone():
                _restore(session)
            _active = None
            activate(None)
    if alive:
        warnings.warn(
            f"unpatch(): {_counted(alive)} built from patched TRL still exist and now run TRL's own code on an engine "
            "it may not know. Build new trainers.",
            PatchedTrainersAlive,
            stacklevel=2,
        )


unpatch = revert


def status() -> PatchReport:
    """Return the report of what is in force: one that is false and says "not patched" where nothing is.

    Its engines are those of this process as of now, whether TRL is patched or not.
    """
    with _lock:
        report = _decided()
        return PatchReport() if report is None else report


def is_decided() -> bool:
    """Tell whether `PatchFastRL` was called here, and has patched TRL or was told by TRLPATCH_DISABLE not to."""
    with _lock:
        return _decided() is not None


def _decided() -> PatchReport | None:
    return _disabled if _active is None else _active.report


def _apply(options: Options, caller: str, pending: list[Warned]) -> PatchReport:
    global _active, _disabled
    if _active is None and read_switch(DISABLE):
        if _disabled is None:
            _disabled = PatchReport(disabled=True)
        return _disabled
    _disabled = None
    wanted = target_names(options.algorithm)
    if options.algorithm is not None:
        require_algorithm(find_trl(), options.algorithm)
    session = _active or _Session(options, caller)
    for name in ("skip", "logps", "old_logps") if _active is not None else ():
        asked, runs = getattr(options, name), getattr(session.options, name)
        if asked != runs:
            earlier, instead = f"{caller}({name}={runs!r})", ""
            if session.caller != caller:
                earlier = f"{session.caller}, which patched with {name}={runs!r}"
                instead = f", or {caller} before {session.caller}"
            raise OptionsConflict(
                f"{caller}({name}={asked!r}) after {earlier}: another set of patches cannot replace the one that "
                f"runs. Call trlpatch.unpatch() first{instead}."
            )
    retried = session.stock if options.on_drift == "raise" else frozenset()
    new = (wanted - session.covered) | (wanted & retried)
    if _active is None or new:
        with removed_arguments.undone():
            _extend(session, options, new, pending)
    session.options, session.caller = options, caller
    activate(options)
    _active = session
    removed_arguments.install(options.compat)
    return session.report


def _extend(session: _Session, options: Options, new: frozenset[str], pending: list[Warned]) -> None:
    """Patch the targets `new` too. Nothing of the session changes if this raises."""
    start, dump_to = time.perf_counter(), read_directory(DUMP)
    batch = prepared_batch(options, new)
    rebound, unfixable = _put_in_place(session, batch.patched)
    session.covered |= new
    session.stock = (session.stock - new) | batch.fit.stock
    session.patched |= {one.source.module: one for one in batch.patched}
    warned: list[Warned] = []
    notes = batch_notes(batch, warned)
    _warn_early(rebound, unfixable, warned)
    milliseconds = (time.perf_counter() - start) * 1000
    if dump_to is not None:
        _dump(dump_to, batch, warned)
    pending += [warning for warning in warned if warning[0] not in session.warned]
    session.warned |= {category for category, _ in warned} - {AlreadyImported, LeftStock}
    report = batch_report(batch, milliseconds=milliseconds, rebound=rebound, unfixable=unfixable, notes=notes)
    session.report = session.report.extended_by(report)


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
        {
            cls
            for one in patched
            if one.source.target.kind in ("trainer", "engine") and one.source.module in sys.modules
            for cls, _ in touched_classes(sys.modules[one.source.module], one.touched)
        }
    )


def _warn_early(rebound: Sequence[str], unfixable: Sequence[str], pending: list[Warned]) -> None:
    if rebound:
        text = f"imported before PatchFastRL and patched in place: {', '.join(rebound)}. Call PatchFastRL() first."
        pending.append((AlreadyImported, "\n".join([text, *(f"out of reach: {line}" for line in unfixable)])))


def _dump(place: Path, batch: Batch, pending: list[Warned]) -> None:
    from trlpatch.runtime.dump import dump

    try:
        dump(place, batch.fit.install.version, batch.patched)
    except OSError as error:
        pending.append((DumpUnavailable, f"{DUMP}={place}: {error}"))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
