"""TRL installation: find it, its version and the sources of its targets, without importing it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trlpatch.errors import TrlNotFound, UnknownAlgorithm, UnsupportedTrl
from trlpatch.source.releases import (
    NEWEST_TESTED,
    OLDEST_SUPPORTED,
    Release,
    format_release,
    parse_release,
)
from trlpatch.source.targets import ALGORITHMS, LEFT_ALONE, TARGETS, Target

_VERSION_LITERAL = r"""(?m)^__version__\s*=\s*["']([^"']+)["']"""


@dataclass(frozen=True)
class TrlInstall:
    """An installed or unpacked TRL; `root` is its `trl` package directory."""

    root: Path
    version: str
    release: Release


@dataclass(frozen=True)
class SourceFile:
    """The upstream text of one target."""

    target: Target
    path: Path
    module: str
    text: str

    @property
    def is_package(self) -> bool:
        """Whether this is the `__init__.py` of a package."""
        return self.path.stem == "__init__"

    @property
    def name(self) -> str:
        """Path inside the distribution, with slashes: `trl/trainer/grpo_trainer.py`."""
        return self.module.replace(".", "/") + ("/__init__.py" if self.is_package else ".py")

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the upstream text as UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def find_trl(path: Path | None = None) -> TrlInstall:
    """Return the TRL that `import trl` would load, or the one at `path`.

    Args:
        path: a `trl` package directory, or a directory that holds one (site-packages, an unpacked wheel, a source
            checkout). None looks on `sys.path`.

    Raises:
        TrlNotFound: there is no TRL there.
        UnparsableVersion: its version is not PEP 440.
        UnsupportedTrl: it is older than 0.18.0.
    """
    root = _installed_root() if path is None else _root_at(path)
    version = _version_of(root)
    release = parse_release(version)
    if release < OLDEST_SUPPORTED:
        raise UnsupportedTrl(
            f"TRL {version} at {root} is older than {format_release(OLDEST_SUPPORTED)}, the first release with an "
            f"in-process vLLM engine for GRPO. trlpatch works on {format_release(OLDEST_SUPPORTED)} to "
            f"{format_release(NEWEST_TESTED)} and tries newer ones. Run: pip install -U trl"
        )
    return TrlInstall(root, version, release)


def _installed_root() -> Path:
    # find_spec of a top-level name runs no code of that package.
    try:
        spec = importlib.util.find_spec("trl")
    except ValueError as error:  # what stands in sys.modules has no __spec__
        raise _stand_in() from error
    if spec is not None and spec.origin is None:
        if not spec.submodule_search_locations:
            raise _stand_in()
        folders = ", ".join(dict.fromkeys(spec.submodule_search_locations))
        raise TrlNotFound(
            f"`import trl` finds no TRL, but a directory without __init__.py: {folders}. A folder of that name comes "
            "first on sys.path, such as that of a checkout. Run from another directory, or: pip install trl"
        )
    if spec is None or spec.origin is None:
        raise TrlNotFound(
            "TRL is not installed in this environment (no package `trl` on sys.path). Run: pip install trl"
        )
    return Path(spec.origin).parent


def _stand_in() -> TrlNotFound:
    return TrlNotFound(
        f"sys.modules['trl'] is {sys.modules.get('trl')!r}, which was not loaded from a file: expected TRL's package. "
        "Take the stand-in out of sys.modules, or call trlpatch.PatchFastRL() before it is put there."
    )


def _root_at(path: Path) -> Path:
    for candidate in (path, path / "trl"):
        if candidate.name == "trl" and (candidate / "trainer").is_dir():
            return candidate
    raise TrlNotFound(
        f"No TRL at {path}: expected a `trl` package directory with a `trainer` folder in it, or a directory that "
        "holds one. Get a release's sources with: pip download trl==1.16.0 --no-deps, then unzip the wheel"
    )


def _version_of(root: Path) -> str:
    # TRL 0.22.0 says `trl.__version__ == "unknown"`; the distribution metadata beside it is right.
    # Its directory's name says the version; importlib.metadata costs 30 ms to import.
    for info in sorted(root.parent.glob("trl-*.dist-info")):
        return info.name.removeprefix("trl-").removesuffix(".dist-info")
    for text_file in (root / "VERSION", root.parent / "VERSION"):
        if text_file.is_file():
            return text_file.read_text(encoding="utf-8").strip()
    init = root / "__init__.py"
    literal = re.search(_VERSION_LITERAL, init.read_text(encoding="utf-8")) if init.is_file() else None
    if literal is None:
        raise TrlNotFound(
            f"The `trl` at {root} does not say its version: expected trl-<version>.dist-info beside it, a VERSION "
            "file, or __version__ in __init__.py. Run: pip install --force-reinstall trl"
        )
    return literal[1]


def target_names(algorithm: str | None) -> frozenset[str]:
    """Return the targets that `algorithm` needs in any release; None means all.

    Raises:
        UnknownAlgorithm: the name is not in the table.
    """
    if algorithm is None:
        return frozenset(TARGETS)
    key = algorithm.lower().replace("-", "_").removesuffix("trainer").removesuffix("_")
    key = {"onlinedpo": "online_dpo", "iwopd": "iw_opd"}.get(key, key)
    if key not in ALGORITHMS:
        raise UnknownAlgorithm(
            f"Unknown algorithm {algorithm!r}: no trainer of that name rolls out on an in-process vLLM engine. "
            f"Known: {', '.join(sorted(ALGORITHMS))}. None patches all of them."
        )
    return frozenset(ALGORITHMS[key])


def sources(install: TrlInstall, algorithm: str | None = None) -> list[SourceFile]:
    """Read the sources of `algorithm`'s targets that exist in this TRL, in the order of the target table.

    A target that the table places in this release but whose file is missing is returned by `missing` instead.

    Raises:
        UnknownAlgorithm: the name is not known, or that trainer has no in-process engine in this release.
    """
    wanted = target_names(algorithm)
    found = []
    for target in TARGETS.values():
        location = target.location(install.release)
        if target.name not in wanted or location is None:
            continue
        path = install.root / location.file
        if path.is_file():
            found.append(SourceFile(target, path, location.qualified, _read(path)))
    if algorithm is not None and not any(source.target.kind == "trainer" for source in found):
        here = sorted(name for name, needs in ALGORITHMS.items() if TARGETS[needs[0]].location(install.release))
        raise UnknownAlgorithm(
            f"{algorithm!r} has no trainer with an in-process vLLM engine in TRL {install.version} at {install.root}. "
            f"This release has: {', '.join(here)}."
        )
    return found


def _read(path: Path) -> str:
    # What read_text returns, in half the time: TRL's files have no carriage returns that it would have to translate.
    content = path.read_bytes()
    return path.read_text(encoding="utf-8") if b"\r" in content else content.decode()


def missing(install: TrlInstall, algorithm: str | None = None) -> list[tuple[Target, Path]]:
    """Return the targets whose file the table expects in this release but which are not there."""
    wanted = target_names(algorithm)
    return [
        (target, install.root / location.file)
        for target in TARGETS.values()
        if target.name in wanted
        and (location := target.location(install.release)) is not None
        and not (install.root / location.file).is_file()
    ]


def left_alone(install: TrlInstall, targets: Collection[str]) -> list[str]:
    """Return the trainers of this TRL that inherit from `targets` and that no hook touches (NashMD and XPO)."""
    if "online_dpo" not in targets:
        return []
    return [
        name
        for name, locations in LEFT_ALONE.items()
        if any(install.release in location.trl and (install.root / location.file).is_file() for location in locations)
    ]
