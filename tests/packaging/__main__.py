"""Build the sdist and the wheel and use them where nothing else is installed: `python -m tests.packaging TRL_TREE`.

TRL_TREE is a TRL wheel, or a directory that holds `trl`, for `trlpatch check`. Needs `build` and a package index.
Checked is: the wheel is built twice, from the tree and the unpacked sdist, with the same bytes; it holds what is not
imported by name; it runs in an environment of its own; the sdist's unit tests pass. Prints the licenses of what was
installed, and what pip-audit says where that is installed and its service knows the packages.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NOT_IMPORTED_BY_NAME = (
    "trlpatch/runtime/bootstrap/sitecustomize.py",
    "trlpatch/compatibility/tested.json",
    "trlpatch/py.typed",
)
UNIT = ["--tier", "unit", "--ignore", "tests/golden", "--ignore", "tests/mutation", "-n", "2", "--dist", "worksteal"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trl", type=Path)
    parser.add_argument("--without-unit-tests", action="store_true", help="they take minutes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wheel, sdist = build(ROOT, folder / "first")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder / "tree", filter="data")
        (tree,) = (folder / "tree").iterdir()
        other, _ = build(tree, folder / "second")
        assert digest(wheel) == digest(other), f"{wheel.name}: other bytes when it is built from the sdist"
        print(f"{wheel.name}: {digest(wheel)}, twice", flush=True)
        look_into(wheel)
        use(wheel, folder, given.trl.resolve())
        if not given.without_unit_tests:
            python = environment(folder / "tests", f"{tree}[test]", "--editable")
            environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            subprocess.run([python, "-m", "pytest", *UNIT, "-q", "tests"], cwd=tree, env=environ, check=True)
    return 0


def build(source: Path, out: Path) -> tuple[Path, Path]:
    """Build both as a release does, the wheel from the sdist; return the wheel and the sdist."""
    environ = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def look_into(wheel: Path) -> None:
    """Fail where the wheel lacks a file, or has one that is not the package's."""
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "trlpatch").rglob("*.py")}
    lacking = sorted((sources | set(NOT_IMPORTED_BY_NAME)) - names)
    foreign = sorted(name for name in names if not name.startswith(("trlpatch/", "trlpatch-")))
    assert not lacking, f"{wheel.name} lacks {lacking}"
    assert not foreign, f"{wheel.name} has {foreign}"


def environment(folder: Path, what: str, *options: str) -> str:
    """Make a virtual environment with `what` in it; return its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options, what]
    subprocess.run(install, check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True, stdout=subprocess.DEVNULL)
    return python


def use(wheel: Path, folder: Path, trl: Path) -> None:
    """Run what users run first, from a directory and with an environment that know nothing of this tree."""
    python = environment(folder / "wheel", str(wheel))
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = str(Path(python).with_name("trlpatch"))
    for command in (
        [python, "-W", "error", "-c", "import trlpatch; print(trlpatch.__file__)"],
        [script, "--help"],
        [script, "list"],
        [script, "check", "--trl-path", str(trl)],
    ):
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command[1:]}: {done.stdout}{done.stderr}"
        print(f"{' '.join([Path(command[0]).name, *command[1:3]])}: works", flush=True)
    (packages,) = (folder / "wheel" / "lib").glob("python*/site-packages")
    for found in sorted(distributions(path=[str(packages)]), key=lambda one: one.name.lower()):
        about = found.metadata
        classified = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
        print(f"  {found.name} {found.version}: {about.get('License-Expression') or ', '.join(classified)}")
    if find_spec("pip_audit"):
        audit = [sys.executable, "-m", "pip_audit", "--path", str(packages)]
        done = subprocess.run(audit, capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).strip()
        # It ends with "No known vulnerabilities found" also where it has looked at none.
        print(f"pip-audit, {said.count('could not be audited')} packages not audited: {said[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
