"""Prepare targets: get the patched text of each from the cache, or from the rewriter and then into the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.outcomes import MODULE, Outcome
from trlpatch.runtime.cache import Cache, Stored, debug, entry_key, rules_digest
from trlpatch.runtime.loader import ModuleSource
from trlpatch.runtime.report import CacheState
from trlpatch.source.locate import SourceFile, TrlInstall

if TYPE_CHECKING:
    from trlpatch.rewrite.rewriter import Rewritten


@dataclass(frozen=True)
class PatchedTarget:
    """A target with the text that shall run.

    Attributes:
        source: the file as TRL ships it.
        module_source: the patched text.
        touched: qualified names of what differs from upstream; empty when nothing does.
    """

    source: SourceFile
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
        """The text as TRL ships it."""
        return ModuleSource(self.source.module, self.source.path, self.source.text, on_disk=True)

    @property
    def runs(self) -> ModuleSource:
        """What the module is executed from: upstream's own file if no patch applies."""
        return self.module_source if self.touched else self.upstream


@dataclass
class PreparedTargets:
    """The targets of one call.

    Attributes:
        failures: the patches that do not fit.
        rejected: where text that failed an output check was kept, by target.
        unwritable: why the cache could not be written, if it could not.
    """

    patched: list[PatchedTarget] = field(default_factory=list)
    failures: list[Outcome] = field(default_factory=list)
    rejected: dict[str, Path] = field(default_factory=dict)
    unwritable: str = ""


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
    cache, rules = Cache(), rules_digest()
    for source in sources:
        key = entry_key(
            target=source.target.name,
            release=install.release,
            upstream_sha256=source.sha256,
            skip=skip,
            rules=rules,
            asked_for=asked_for,
        )
        stored = cache.read(key, source.path.name)
        known = None if stored is None else _from_cache(source, stored)
        if known is not None:
            prepared.patched.append(known)
        else:
            _rewrite(prepared, cache, key, install, source, skip=frozenset(skip), asked_for=frozenset(asked_for))
    return prepared


def _from_cache(source: SourceFile, stored: Stored) -> PatchedTarget | None:
    try:
        outcomes = tuple(Outcome(**outcome) for outcome in stored.manifest["outcomes"])
        touched = tuple(map(str, stored.manifest["touched"]))
    except (KeyError, TypeError) as error:
        debug("cache miss: the manifest beside %s cannot be used: %r", stored.path, error)
        return None
    text = ModuleSource(source.module, stored.path, stored.text, on_disk=True, package=_package(source))
    return PatchedTarget(source, text, touched, outcomes, "hit")


def _rewrite(
    prepared: PreparedTargets,
    cache: Cache,
    key: str,
    install: TrlInstall,
    source: SourceFile,
    **selection: frozenset[str],
) -> None:
    from trlpatch.rewrite.rewriter import rewrite

    result = rewrite(source, install.release, **selection)
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
    text = ModuleSource(source.module, path, result.text, on_disk=on_disk, package=_package(source))
    return PatchedTarget(source, text, result.touched, result.outcomes, "miss" if on_disk else "memory")


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
