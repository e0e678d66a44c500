"""Get the patched text of every target: from the cache, or from the rewriter and then into the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import AnchorDrift, PatchError
from trlpatch.runtime.cache import Cache, Stored, debug, entry_key, publish, rules_digest
from trlpatch.runtime.loader import Executable
from trlpatch.runtime.report import CacheState, Entry
from trlpatch.source.locate import SourceFile, TrlInstall, components
from trlpatch.source.targets import Target

if TYPE_CHECKING:
    from trlpatch.rewrite.rewriter import Drift, Outcome

WHOLE_FILE = "every patch"
"""Stands for the name of a patch where a file as a whole cannot be used."""

MODULE = "<module>"
"""Stands for the module level in a list of touched names."""

OUTPUT_CHECK = "output check"
"""The rewriter's name for a failed check of its own output."""


@dataclass(frozen=True)
class Patched:
    """A target with the text that shall run.

    Attributes:
        touched: qualified names of what differs from upstream; empty when nothing does.
    """

    source: SourceFile
    executable: Executable
    touched: tuple[str, ...]
    entries: tuple[Entry, ...]
    cache: CacheState

    @property
    def repairs_imports_only(self) -> bool:
        """Whether it makes no difference to a module that could be imported without it."""
        return self.touched == (MODULE,)

    @property
    def upstream(self) -> Executable:
        """The text as TRL ships it."""
        return Executable(self.source.module, self.source.path, self.source.text, on_disk=True)

    @property
    def runs(self) -> Executable:
        """What the module is executed from: upstream's own file if no patch applies."""
        return self.executable if self.touched else self.upstream


@dataclass(frozen=True)
class Failure:
    """A patch that does not fit, or a file that is not where the target table has it."""

    target: str
    patch: str
    reason: str
    drift: Drift | None = None

    @property
    def entry(self) -> Entry:
        """The failure as the report shows it."""
        return Entry(self.target, self.patch, "failed", self.reason)


@dataclass
class Collected:
    """The targets of one call.

    Attributes:
        unwritable: why the cache could not be written, if it could not.
        absent: notes on targets of this release whose file is not there and which nothing else needs.
    """

    patched: list[Patched]
    failures: list[Failure]
    unwritable: str = ""
    absent: tuple[str, ...] = ()


def collect(
    install: TrlInstall, sources: Sequence[SourceFile], missing: Iterable[tuple[Target, Path]], skip: tuple[str, ...]
) -> Collected:
    """Read or make the patched text of `sources`.

    Raises:
        UnknownPatch: `skip` names a patch that does not exist. (Such a key is never in the cache.)
    """
    collected = Collected([], _needed_but_missing(sources, missing))
    collected.absent = tuple(
        f"target {target.name} is left out: its file {path} is not in TRL {install.version}"
        for target, path in missing
        if all(failure.target != target.name for failure in collected.failures)
    )
    cache, rules = Cache(), rules_digest()
    for source in sources:
        key = entry_key(
            target=source.target.name,
            release=install.release,
            upstream_sha256=source.sha256,
            skip=skip,
            rules=rules,
        )
        stored = cache.read(key, source.path.name)
        known = None if stored is None else _from_cache(source, stored)
        if known is not None:
            collected.patched.append(known)
        else:
            _rewrite(collected, cache, key, install, source, skip)
    return collected


def _needed_but_missing(sources: Sequence[SourceFile], missing: Iterable[tuple[Target, Path]]) -> list[Failure]:
    needed = {name: source.target.name for source in sources for name in source.target.couples}
    return [
        Failure(target.name, WHOLE_FILE, f"{needed[target.name]} needs it, and its file {path} is not there")
        for target, path in missing
        if target.name in needed
    ]


def _from_cache(source: SourceFile, stored: Stored) -> Patched | None:
    try:
        entries = tuple(Entry(**outcome) for outcome in stored.manifest["outcomes"])
        touched = tuple(map(str, stored.manifest["touched"]))
    except (KeyError, TypeError) as error:
        debug("cache miss: the manifest beside %s cannot be used: %r", stored.path, error)
        return None
    executable = Executable(source.module, stored.path, stored.text, on_disk=True, package=_package(source))
    return Patched(source, executable, touched, entries, "hit")


def _rewrite(
    collected: Collected, cache: Cache, key: str, install: TrlInstall, source: SourceFile, skip: tuple[str, ...]
) -> None:
    from trlpatch.rewrite.rewriter import rewrite

    try:
        result = rewrite(source, install.release, skip=frozenset(skip))
    except SyntaxError as error:
        reason = f"{source.path}:{error.lineno} is not Python: {error.msg}. Run: pip install --force-reinstall trl"
        collected.failures.append(Failure(source.target.name, WHOLE_FILE, reason))
        return
    failed = [outcome for outcome in result.outcomes if outcome.status == "failed"]
    if failed:
        collected.failures += [Failure(o.target, o.patch, o.reason, o.drift) for o in failed]
        return
    entries = tuple(map(_entry, result.outcomes))
    state: CacheState = "miss"
    path = cache.root / "memory" / key[:16] / source.path.name
    if not collected.unwritable:
        try:
            path = cache.write(key, source.path.name, result.text, _manifest(install, source, result.touched, entries))
        except OSError as error:
            collected.unwritable = f"{cache.root}: {error.strerror or error}"
            debug("cannot write cache entry %s", key, exc_info=True)
    if collected.unwritable:
        state = "memory"
    executable = Executable(source.module, path, result.text, on_disk=state == "miss", package=_package(source))
    collected.patched.append(Patched(source, executable, result.touched, entries, state))


def _package(source: SourceFile) -> Path | None:
    return source.path if source.is_package else None


def _entry(outcome: Outcome) -> Entry:
    return Entry(outcome.target, outcome.patch, outcome.status, outcome.reason, outcome.variant, dict(outcome.anchors))


def _manifest(
    install: TrlInstall, source: SourceFile, touched: tuple[str, ...], entries: tuple[Entry, ...]
) -> Mapping[str, Any]:
    return {
        "trl": install.version,
        "target": source.target.name,
        "module": source.module,
        "upstream": {"path": str(source.path), "sha256": source.sha256},
        "touched": list(touched),
        "outcomes": [dataclasses.asdict(entry) for entry in entries],
    }


def stock_targets(failures: Iterable[Failure], sources: Sequence[SourceFile]) -> frozenset[str]:
    """Return the targets that must stay stock: those that failed and all they are coupled to."""
    failed = {failure.target for failure in failures}
    names = list(dict.fromkeys([source.target.name for source in sources] + sorted(failed)))
    return frozenset().union(*(component for component in components(names) if component & failed))


def drift_error(install: TrlInstall, failures: Sequence[Failure]) -> PatchError:
    """Return one error that lists every failure; AnchorDrift when all of them are anchors that moved."""
    blocks = "\n\n".join(describe(install, failure) for failure in failures)
    targets = sorted({failure.target for failure in failures})
    skippable = tuple(sorted({failure.patch for failure in failures} - {WHOLE_FILE, OUTPUT_CHECK}))
    skip = f"skip={skippable!r} leaves {'these' if len(skippable) > 1 else 'this patch'} out; " if skippable else ""
    text = (
        f"{len(failures)} patch{'es do' if len(failures) > 1 else ' does'} not fit TRL {install.version} "
        f"(targets {', '.join(targets)})\n{blocks}\n\n"
        f"  effect   TRL is unpatched; {skip}"
        'on_drift="stock" keeps TRL\'s own code for these targets and those coupled to them\n'
        "  more     trlpatch check"
    )
    drifted = all(failure.drift is not None and failure.patch != OUTPUT_CHECK for failure in failures)
    return (AnchorDrift if drifted else PatchError)(text)


def describe(install: TrlInstall, failure: Failure) -> str:
    """Return what is known of one failure, as indented lines."""
    lines = [f"  patch    {failure.patch} on {failure.target} of TRL {install.version}"]
    drift = failure.drift
    if drift is None:
        return "\n".join([*lines, f"  reason   {failure.reason}"])
    nearest = f";  nearest: line {drift.lookalike}" if drift.lookalike else ""
    return "\n".join(
        [
            *lines,
            f"  file     {drift.file}:{drift.line}",
            f"  method   {drift.qualname}",
            f"  anchor   {failure.reason or _counts(drift)}{nearest}",
        ]
    )


def _counts(drift: Drift) -> str:
    return f"{drift.anchor}: expected {drift.expected}, found {drift.found}"


def dump(directory: Path, version: str, patched: Iterable[Patched]) -> None:
    """Write what runs to `directory/<version>/trl/...`, for reading.

    Raises:
        OSError: it cannot be written.
    """
    for one in patched:
        path = directory / version / one.source.name
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, one.runs.text.encode())
