"""TRL installation: find it, its version and the sources of its targets, without importing it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

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


class TrlInstall(NamedTuple):
    """An installed or unpacked TRL; `root` is its `trl` package directory."""

    root: Path
    version: str
    release: Release


class SourceFile:
    """The upstream file of one target.

    Args:
        text: what it holds; None reads it when it is first asked for.
    """

    # A plain class for the reason that `trlpatch.outcomes` gives.
    def __init__(self, target: Target, path: Path, module: str, text: str | None = None) -> None:
        self.target = target
        self.path = path
        self.module = module
        self._text = text

    @property
    def text(self) -> str:
        """The upstream text."""
        if self._text is None:
            self._text = _read(self.path)
        return self._text

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
    root = installed_root() if path is None else _root_at(path)
    version = _version_of(root)
    release = parse_release(version)
    if release < OLDEST_SUPPORTED:
        raise UnsupportedTrl(
            f"TRL {version} at {root} is older than {format_release(OLDEST_SUPPORTED)}, the first release with an "
            f"in-process vLLM engine for GRPO. trlpatch works on {format_release(OLDEST_SUPPORTED)} to "
            f"{format_release(NEWEST_TESTED)} and tries newer ones. Run: pip install -U trl"
        )
    return TrlInstall(root, version, release)


def installed_root() -> Path:
    """Return the package directory of the TRL that `import trl` would load.

    Raises:
        TrlNotFound: it would load none, or something else of that name.
    """
    # find_spec of a top-level name runs no code of that package.
    try:
        spec = importlib.util.find_spec("trl")
    except ValueError as error:  # what stands in sys.modules has no __spec__
        raise _stand_in() from error
    if spec is not None and spec.origin is not None and spec.submodule_search_locations is None:
        raise TrlNotFound(
            f"`import trl` finds {spec.origin}, a single module, instead of the package TRL. Rename or remove it, or "
            "put the directory that holds TRL before it on sys.path."
        )
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
    infos = [name for name in _names_in(root.parent) if name.startswith("trl-") and name.endswith(".dist-info")]
    if infos:
        return min(infos).removeprefix("trl-").removesuffix(".dist-info")
    for text_file in (root / "VERSION", root.parent / "VERSION"):
        if text_file.is_file():
            return _decoded(text_file).strip()
    init = root / "__init__.py"
    literal = re.search(_VERSION_LITERAL, _decoded(init)) if init.is_file() else None
    if literal is None:
        raise TrlNotFound(
            f"The `trl` at {root} does not say its version: expected trl-<version>.dist-info beside it, a VERSION "
            "file, or __version__ in __init__.py. Run: pip install --force-reinstall trl"
        )
    return literal[1]


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - glob compiles a pattern, which takes ten times as long
    except OSError:
        return []


WITHOUT_ENGINE = frozenset(
    {"bco", "cpo", "dpo", "gkd", "kto", "nash_md", "nashmd", "orpo", "ppo", "prm", "reward", "sft", "xpo"}
)
"""TRL's trainers that no release gives an in-process engine, or that are left alone (NashMD, XPO)."""
STAYS_STOCK = "TRL's trainer of that name never rolls out on an in-process vLLM engine"


def trainer_key(name: str) -> str:
    """Return "dpo" for "DPOTrainer" and "dpo-trainer"."""
    return name.lower().replace("-", "_").removesuffix("trainer").removesuffix("_")


def spelled(algorithm: str) -> str:
    """Return the key of `ALGORITHMS` that `algorithm` spells: "OnlineDPOTrainer", "online-dpo" are "online_dpo".

    Raises:
        UnknownAlgorithm: the name is not in the table.
    """
    key = trainer_key(algorithm)
    key = {"onlinedpo": "online_dpo", "iwopd": "iw_opd"}.get(key, key)
    if key not in ALGORITHMS:
        import difflib  # here: a warm start does not need it

        if key in WITHOUT_ENGINE:  # a guess would name another trainer than the one that is meant
            raise UnknownAlgorithm(
                f"Unknown algorithm {algorithm!r}: {STAYS_STOCK}. It needs no patch, and trains as TRL has it: leave "
                "the call out. "
                f"Known: {', '.join(sorted(ALGORITHMS))}."
            )
        near = difflib.get_close_matches(key, ALGORITHMS, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else "."
        raise UnknownAlgorithm(
            f"Unknown algorithm {algorithm!r}{guess} No trainer of that name rolls out on an in-process vLLM engine. "
            f"Known: {', '.join(sorted(ALGORITHMS))}. PatchFastRL() patches all of them."
        )
    return key


def target_names(algorithm: str | None) -> frozenset[str]:
    """Return the targets that `algorithm` needs in any release; None means all.

    Raises:
        UnknownAlgorithm: the name is not in the table.
    """
    return frozenset(TARGETS if algorithm is None else ALGORITHMS[spelled(algorithm)])


def sources(install: TrlInstall, algorithm: str | None = None, *, read: bool = True) -> list[SourceFile]:
    """Return the sources of `algorithm`'s targets that exist in this TRL, in the order of the target table.

    A target that the table places in this release but whose file is missing is returned by `missing` instead.

    Args:
        read: read them now; otherwise each is read when its text is first asked for.

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
            found.append(SourceFile(target, path, location.qualified, _read(path) if read else None))
    return found


def _read(path: Path) -> str:
    """Return what a source holds."""
    return _decoded(path)


def _decoded(path: Path) -> str:
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
