"""The sources of the pinned TRL releases: their wheels, downloaded without dependencies and checked by hash.

Needs pip and nothing that TRL needs. Wheels and unpacked trees stay in `$TRLPATCH_WHEEL_CACHE`, by default
`wheels` in trlpatch's user cache directory, so a second run needs no network. Any number of processes may share it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RELEASES_TOML = ROOT / "golden" / "releases.toml"
DOWNLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class PinnedRelease:
    """One `[[release]]` of golden/releases.toml."""

    version: str
    sha256: str
    requires_python: str
    cpu: str
    tier: str
    note: str = ""


@dataclass(frozen=True)
class Stack:
    """One `[stacks.*]` of golden/releases.toml: what a release runs on when a real engine is wanted."""

    name: str
    description: str
    vllm: str
    no_deps: tuple[str, ...]
    requirements: Path | None


class SourcesUnavailable(Exception):
    """A wheel could not be downloaded or is not the pinned one. Tests fail on this, they never skip."""


def pinned() -> dict[str, PinnedRelease]:
    """Return the pinned releases by version, in the order of the file."""
    entries = tomllib.loads(RELEASES_TOML.read_text(encoding="utf-8"))["release"]
    return {entry["version"]: PinnedRelease(**entry) for entry in entries}


def stacks() -> dict[str, Stack]:
    """Return the CPU stacks by name."""
    tables = tomllib.loads(RELEASES_TOML.read_text(encoding="utf-8"))["stacks"]
    return {
        name: Stack(
            name,
            table["description"],
            table["vllm"],
            tuple(table["no_deps"]),
            ROOT / table["requirements"] if "requirements" in table else None,
        )
        for name, table in tables.items()
    }


def wheel_cache() -> Path:
    """Return the directory of wheels, made on first use."""
    if configured := os.environ.get("TRLPATCH_WHEEL_CACHE"):
        cache = Path(configured)
    else:
        # Imported here: with the variable set, this module needs the standard library only.
        import platformdirs

        cache = platformdirs.user_cache_path("trlpatch") / "wheels"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def wheel(release: PinnedRelease, cache: Path) -> Path:
    """Return the release's wheel, downloading it when the cache lacks it.

    Raises:
        SourcesUnavailable: pip cannot get it, or what is there has another hash than the pinned one.
    """
    path = cache / f"trl-{release.version}-py3-none-any.whl"
    if not path.is_file():
        _download(release.version, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != release.sha256:
        raise SourcesUnavailable(
            f"{path} is not the pinned wheel of TRL {release.version}: expected sha256 {release.sha256}, found "
            f"{found}. Delete it to download it again; if that gives the same, the package index changed the file."
        )
    return path


def unpacked(release: PinnedRelease, cache: Path) -> Path:
    """Return a directory holding the release's `trl` package and its dist-info, fit for PYTHONPATH."""
    tree = cache / "unpacked" / f"{release.version}-{release.sha256[:12]}"
    if tree.is_dir():
        return tree
    archive = wheel(release, cache)
    tree.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
        staging = Path(scratch) / "tree"
        with zipfile.ZipFile(archive) as content:
            content.extractall(staging)
        try:
            staging.rename(tree)
        except OSError:
            # Another process finished the same tree first; a directory is never renamed onto a full one.
            if not tree.is_dir():
                raise
    return tree


def fetch(releases: list[PinnedRelease], cache: Path) -> dict[str, SourcesUnavailable]:
    """Unpack many releases, several downloads at a time; returns the failures by version."""

    def attempt(release: PinnedRelease) -> SourcesUnavailable | None:
        try:
            unpacked(release, cache)
        except SourcesUnavailable as error:
            return error
        return None

    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        outcomes = pool.map(attempt, releases)
        return {release.version: error for release, error in zip(releases, outcomes, strict=True) if error}


def _download(version: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", scratch, f"trl=={version}"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        downloaded = Path(scratch) / path.name
        if done.returncode != 0 or not downloaded.is_file():
            asked = " ".join(command[1:])
            raise SourcesUnavailable(
                f"Cannot download TRL {version} (`python {asked}` exited {done.returncode}):\n{done.stderr.strip()}\n"
                "Its wheel is needed once; without a network, point TRLPATCH_WHEEL_CACHE at a directory of wheels."
            )
        downloaded.replace(path)
