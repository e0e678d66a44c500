"""Support another TRL release: `python -m tests.releases add X.Y.Z`, in the `dev` environment.

Writes what follows from the release's wheel: its entry in golden/releases.toml, where tox and CI read which releases
there are, `NEWEST_TESTED` in the package, the bound of the extra `demo`, its expected anchors and its goldens. Writes
nothing twice, so run it again after a patch was changed. What it leaves to people is in CONTRIBUTING.md.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from tests.golden.sources import RELEASES_TOML, ROOT, PinnedRelease, pinned, wheel_cache
from trlpatch.source.releases import parse_release

ENTRY = """
[[release]]
version = "{version}"
sha256 = "{sha256}"
requires_python = "{requires_python}"
cpu = "{cpu}"
tier = "cpu"
"""

TESTS = tuple(
    f"tests/golden/test_{name}.py"
    for name in (
        "anchors",
        "async_shapes",
        "census",
        "golden",
        "logps",
        "old_logps",
    )
)
"""Those that a release makes a difference to: 11 of the 60 s of CPU time that all of tests/golden take for one."""

RELEASES_PY = ROOT / "trlpatch" / "source" / "releases.py"
PYPROJECT = ROOT / "pyproject.toml"


class CannotAdd(Exception):
    """The release is not newer than all pinned ones, or a file has not the line that is to be changed."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] != "add" or not re.fullmatch(r"\d+\.\d+\.\d+", arguments[1]):
        print(__doc__)
        return 2
    version = arguments[1]
    if version not in pinned():
        path = downloaded(version, wheel_cache())
        RELEASES_TOML.write_text(
            with_entry(RELEASES_TOML.read_text(encoding="utf-8"), version, path), encoding="utf-8"
        )
    for file, text in {
        RELEASES_PY: with_newest_tested(RELEASES_PY.read_text(encoding="utf-8"), version),
        PYPROJECT: with_demo_bound(PYPROJECT.read_text(encoding="utf-8"), version),
    }.items():
        file.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", *TESTS, "--golden-update", "--trl", version]
    return subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode


def downloaded(version: str, cache: Path) -> Path:
    """Return the wheel of a release whose hash nobody has pinned yet, from the cache or from the package index."""
    path = cache / f"trl-{version}-py3-none-any.whl"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(cache), f"trl=={version}"], check=True)
    return path


def with_entry(table: str, version: str, wheel: Path) -> str:
    """Return golden/releases.toml with the release as its newest; the newest until now goes to tier "golden".

    Raises:
        CannotAdd: the table has a newer release.
    """
    head, mark, last = table.rpartition("[[release]]")
    (newest,) = re.findall(r'^version = "(.+)"$', last, re.MULTILINE)
    (cpu,) = re.findall(r'^cpu = "(.+)"$', last, re.MULTILINE)
    if parse_release(version) <= parse_release(newest):
        raise CannotAdd(f"golden/releases.toml: TRL {version} is not newer than {newest}. Write its entry by hand.")
    with ZipFile(wheel) as archive:
        metadata = HeaderParser().parsestr(archive.read(f"trl-{version}.dist-info/METADATA").decode())
    release = PinnedRelease(
        version, hashlib.sha256(wheel.read_bytes()).hexdigest(), metadata["Requires-Python"], cpu, "cpu"
    )
    last = last.replace('tier = "cpu"', 'tier = "golden"')
    return head + mark + last.rstrip("\n") + "\n" + ENTRY.format_map(vars(release))


def with_newest_tested(module: str, version: str) -> str:
    """Return trlpatch/source/releases.py with `NEWEST_TESTED` at the release."""
    return _replaced(r"^(NEWEST_TESTED: Release = )\(.*\)$", rf"\g<1>{parse_release(version)}", module)


def with_demo_bound(pyproject: str, version: str) -> str:
    """Return pyproject.toml with the extra `demo` open for the release and closed for the next minor one."""
    major, minor, *_ = parse_release(version)
    return _replaced(r'^(    "trl>=[\d.]+,<)[\d.]+(",)$', rf"\g<1>{major}.{minor + 1}\g<2>", pyproject)


def _replaced(pattern: str, by: str, text: str) -> str:
    changed, count = re.subn(pattern, by, text, flags=re.MULTILINE)
    if count != 1:
        raise CannotAdd(f"expected one line that matches {pattern}, found {count}; change it by hand")
    return changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
