"""TRL installation: find it, its version and the sources of its targets, without importing it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trlpatch.errors import TrlNotFound, UnknownAlgorithm, UnreadableSource, UnsupportedTrl
from trlpatch.source.releases import (
    NEWEST_TESTED,
    OLDEST_SUPPORTED,
    Release,
    format_release,
    parse_release,
)
from trlpatch.source.targets import ALGORITHMS, LEFT_ALONE, TARGETS, Target

_REINSTALL = "Run: pip install --force-reinstall --no-deps trl"
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
    except ValueError as error:  # what find_spec raises for a module in sys.modules without __spec__
        raise TrlNotFound(
            "sys.modules holds a module `trl` that was not imported from a file (it has no __spec__). Remove it "
            "before PatchFastRL(): del sys.modules['trl']"
        ) from error
    if spec is not None and spec.origin is not None and spec.submodule_search_locations is None:
        raise TrlNotFound(
            f"`import trl` finds {spec.origin}, a single module, instead of the package TRL. Rename or remove it, or "
            "put the directory that holds TRL before it on sys.path."
        )
    if spec is None or spec.origin is None:
        raise TrlNotFound(
            "TRL is not installed in this environment (no package `trl` on sys.path). Run: pip install trl"
        )
    return Path(spec.origin).parent


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
            return _read(text_file).strip()
    init = root / "__init__.py"
    literal = re.search(_VERSION_LITERAL, _read(init)) if init.is_file() else None
    if literal is None:
        raise TrlNotFound(
            f"The `trl` at {root} does not say its version: expected trl-<version>.dist-info beside it, a VERSION "
            "file, or __version__ in __init__.py. Run: pip install --force-reinstall trl"
        )
    return literal[1]


def spelled(algorithm: str) -> str:
    """Return the key of `ALGORITHMS` that `algorithm` spells: "OnlineDPOTrainer", "online-dpo" are "online_dpo".

    Raises:
        UnknownAlgorithm: the name is not in the table.
    """
    key = algorithm.lower().replace("-", "_").removesuffix("trainer").removesuffix("_")
    key = {"onlinedpo": "online_dpo", "iwopd": "iw_opd"}.get(key, key)
    if key not in ALGORITHMS:
        raise UnknownAlgorithm(
            f"Unknown algorithm {algorithm!r}: no trainer of that name rolls out on an in-process vLLM engine. "
            f"Known: {', '.join(sorted(ALGORITHMS))}. None patches all of them."
        )
    return key


def target_names(algorithm: str | None) -> frozenset[str]:
    """Return the targets that `algorithm` needs in any release; None means all.

    Raises:
        UnknownAlgorithm: the name is not in the table.
    """
    return frozenset(TARGETS if algorithm is None else ALGORITHMS[spelled(algorithm)])


def sources(install: TrlInstall, algorithm: str | None = None) -> list[SourceFile]:
    """Read the sources of `algorithm`'s targets that exist in this TRL, in the order of the target table.

    A target that the table places in this release but whose file is missing is returned by `missing` instead.

    Raises:
        UnknownAlgorithm: the name is not in the table.
        UnreadableSource: a file cannot be read, or is not the UTF-8 that TRL's files are.
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
    return found


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        # What read_text returns, in half the time: TRL's files have no carriage returns that it would translate.
        text = content.decode() if b"\r" not in content else path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnreadableSource(f"Cannot read {path}: {error.strerror or error}. {_REINSTALL}") from error
    except UnicodeDecodeError as error:
        raise _undecodable(path, error) from error
    if "\0" in text:
        raise UnreadableSource(f"{path} holds a NUL character: the file is damaged. {_REINSTALL}")
    return text.removeprefix("\ufeff")


def _undecodable(path: Path, error: UnicodeDecodeError) -> UnreadableSource:
    line = error.object.count(b"\n", 0, error.start) + 1
    return UnreadableSource(
        f"{path}:{line} is not UTF-8, as every file of TRL is: byte 0x{error.object[error.start]:02x} at offset "
        f"{error.start}. The file was changed or damaged. {_REINSTALL}"
    )


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
