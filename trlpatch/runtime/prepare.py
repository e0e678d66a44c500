"""Prepare targets: get the patched text of each from the cache, or from the rewriter and then into the cache.

Where neither a file of TRL nor a rule of trlpatch changed since the last start, the index says what the cache holds,
and a text is read and verified when its module is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trlpatch.errors import PatchError
from trlpatch.outcomes import MODULE, Outcome
from trlpatch.runtime.cache import Cache, debug, entry_key
from trlpatch.runtime.index import Index, stamp
from trlpatch.runtime.loader import ModuleSource
from trlpatch.runtime.report import CacheState
from trlpatch.runtime.rules import rule_places, rules_digest, rules_versions
from trlpatch.source.locate import SourceFile, TrlInstall

if TYPE_CHECKING:
    from trlpatch.rewrite.rewriter import Rewritten


class PatchedTarget(NamedTuple):
    """A target with the text that shall run.

    Attributes:
        source: the file as TRL ships it.
        upstream_sha256: hash of the text of `source` that the patched text was made from.
        module_source: the patched text.
        touched: qualified names of what differs from upstream; empty when nothing does.
    """

    source: SourceFile
    upstream_sha256: str
    module_source: ModuleSource
    touched: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    cache: CacheState

    @property
    def repairs_imports_only(self) -> bool:
        """Whether it makes no difference to a module that could be imported without it."""
        return self.touched == (MODULE,)

    @property
    def upstream(self) -> ModuleSource:
        """The text as TRL ships it.

        Raises:
            PatchError: it is another one by now.
        """
        _refuse_changed(self.source, self.upstream_sha256)
        return ModuleSource(self.source.module, self.source.path, self.source.text)

    @property
    def file(self) -> Path:
        """What the module is executed from: upstream's own file if no patch applies."""
        return self.module_source.path if self.touched else self.source.path

    @property
    def text(self) -> str:
        """What the file that is executed holds."""
        return self.module_source.text if self.touched else self.upstream.text


class PreparedTargets:
    """The targets of one call.

    Attributes:
        failures: the patches that do not fit.
        rejected: where text that failed an output check was kept, by target.
        unwritable: why the cache could not be written, if it could not.
    """

    # A plain class for the reason that `trlpatch.outcomes` gives.
    def __init__(self) -> None:
        self.patched: list[PatchedTarget] = []
        self.failures: list[Outcome] = []
        self.rejected: dict[str, Path] = {}
        self.unwritable = ""


class _Selection(NamedTuple):
    """All that decides patched text beside the sources and the rules."""

    install: TrlInstall
    skip: tuple[str, ...]
    asked_for: tuple[str, ...]

    def key(self, source: SourceFile, rules: str) -> str:
        return entry_key(
            target=source.target.name,
            release=self.install.release,
            upstream_sha256=source.sha256,
            skip=self.skip,
            rules=rules,
            asked_for=self.asked_for,
        )


def prepare_targets(
    install: TrlInstall,
    sources: Sequence[SourceFile],
    skip: tuple[str, ...],
    asked_for: tuple[str, ...] = (),
) -> PreparedTargets:
    """Read or make the patched text of `sources`, without the patches in `skip`, with the optional ones `asked_for`.

    Raises:
        UnknownPatch: `skip` names a patch that does not exist. (Such a key is never in the cache.)
    """
    prepared = PreparedTargets()
    cache, selection = Cache(), _Selection(install, skip, asked_for)
    index, question = Index(cache), _question(selection, sources)
    now = stamp([*(source.path for source in sources), *rule_places()])
    known = _indexed(cache, selection, sources, index.recall(question, now))
    if known:
        prepared.patched += known
        return prepared
    rules, manifests = rules_digest(), []
    for source in sources:
        key = selection.key(source, rules)
        stored = cache.read(key, source.path.name)
        hit = stored and _from_cache(source, stored.path, stored.text, stored.manifest)
        if stored and hit:
            prepared.patched.append(hit)
            manifests.append(stored.manifest)
        else:
            _rewrite(prepared, cache, key, selection, source)
    if len(manifests) == len(sources):
        files = [one.module_source.path for one in prepared.patched]
        index.record(question, now, {"manifests": manifests, "files": stamp(files).digest})
    return prepared


def _question(selection: _Selection, sources: Sequence[SourceFile]) -> tuple[str, ...]:
    """Return what decides the prepared targets beside the files that are stamped, see `trlpatch.runtime.index`."""
    install, skip, asked_for = selection
    targets = (source.target.name for source in sources)
    return "prepared", str(install.root), install.version, *rules_versions(), repr((*targets, skip, asked_for))


def _indexed(cache: Cache, selection: _Selection, sources: Sequence[SourceFile], answer: Any) -> list[PatchedTarget]:
    """Return the targets that an answer of the index describes; none where the cache is not as it was."""
    if answer is None:
        return []
    try:
        found = [
            _from_cache(
                source,
                cache.entry(manifest["key"]) / source.path.name,
                _later(cache, selection, source, manifest),
                manifest,
            )
            for source, manifest in zip(sources, answer["manifests"], strict=True)
        ]
        known = [one for one in found if one is not None]
        if len(known) == len(found) and stamp(one.module_source.path for one in known).digest == answer["files"]:
            return known
    except (KeyError, TypeError, ValueError) as error:
        debug("index miss: the answer cannot be used: %r", error)
    return []


def _later(
    cache: Cache, selection: _Selection, source: SourceFile, manifest: Mapping[str, Any]
) -> Callable[[], tuple[str, bool]]:
    """Return what reads a text when its module is imported, and makes it anew if it is gone or damaged by then."""
    key, sha256, upstream_sha256 = manifest["key"], manifest["patched_sha256"], manifest["upstream"]["sha256"]

    def read() -> tuple[str, bool]:
        try:
            return cache.text(key, source.path.name, sha256), True
        except (OSError, ValueError) as error:
            debug("%s cannot be used any more: %s", cache.entry(key), error)
        _refuse_changed(source, upstream_sha256)
        anew = PreparedTargets()
        # Under the key of the rules as they are now: trlpatch may have been upgraded, too.
        _rewrite(anew, cache, selection.key(source, rules_digest()), selection, source)
        if anew.failures:
            from trlpatch.runtime.failures import failure_error
            from trlpatch.runtime.fit import judge_fit

            one = frozenset({source.target.name})
            raise failure_error(judge_fit(selection.install, [source], one, anew.failures), anew.rejected)
        made = anew.patched[0].module_source
        return made.text, made.on_disk and made.path.parent == cache.entry(key)

    return read


def _refuse_changed(source: SourceFile, sha256: str) -> None:
    if source.sha256 != sha256:
        raise PatchError(
            f"{source.path} changed after PatchFastRL(): expected the text with SHA-256 {sha256[:12]}, found "
            f"{source.sha256[:12]}. Start a new process."
        )


def _from_cache(
    source: SourceFile, path: Path, text: str | Callable[[], tuple[str, bool]], manifest: Mapping[str, Any]
) -> PatchedTarget | None:
    try:
        outcomes = tuple(Outcome(**outcome) for outcome in manifest["outcomes"])
        touched = tuple(map(str, manifest["touched"]))
        upstream_sha256 = str(manifest["upstream"]["sha256"])
    except (KeyError, TypeError) as error:
        debug("cache miss: the manifest of %s cannot be used: %r", path, error)
        return None
    module = ModuleSource(source.module, path, text, package=_package(source))
    return PatchedTarget(source, upstream_sha256, module, touched, outcomes, "hit")


def _rewrite(prepared: PreparedTargets, cache: Cache, key: str, selection: _Selection, source: SourceFile) -> None:
    from trlpatch.rewrite.rewriter import rewrite

    install, skip, asked_for = selection
    result = rewrite(source, install.release, skip=frozenset(skip), asked_for=frozenset(asked_for))
    if not result.failed:
        prepared.patched.append(_published(prepared, cache, key, install, result))
        return
    prepared.failures += result.failed
    if result.rejected and (kept := cache.keep_rejected(key, source.path.name, result.rejected)) is not None:
        prepared.rejected[source.target.name] = kept


def _published(
    prepared: PreparedTargets, cache: Cache, key: str, install: TrlInstall, result: Rewritten
) -> PatchedTarget:
    """Put the text into the cache; where that fails it stays in memory, under a path that does not exist."""
    source = result.source
    path = cache.root / "memory" / key[:16] / source.path.name
    if not prepared.unwritable:
        try:
            path = cache.write(key, source.path.name, result.text, _manifest(install, result))
        except OSError as error:
            prepared.unwritable = f"{cache.root}: {error.strerror or error}"
            debug("cannot write cache entry %s", key, exc_info=True)
    on_disk = not prepared.unwritable
    module = ModuleSource(source.module, path, result.text, on_disk, _package(source))
    state: CacheState = "miss" if on_disk else "memory"
    return PatchedTarget(source, source.sha256, module, result.touched, result.outcomes, state)


def _package(source: SourceFile) -> Path | None:
    return source.path if source.is_package else None


def _manifest(install: TrlInstall, result: Rewritten) -> Mapping[str, Any]:
    source = result.source
    return {
        "trl": install.version,
        "target": source.target.name,
        "module": source.module,
        "upstream": {"path": str(source.path), "sha256": source.sha256},
        "touched": list(result.touched),
        "outcomes": [outcome.to_dict() for outcome in result.outcomes],
    }
