"""llama.cpp's converter: a few files of the llama-cpp-python sdist, which vendors llama.cpp, pinned by their hash.

Nothing is built, nothing comes from a repository, and pip fetches the sdist the way the user has pip configured.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trlpatch.errors import CannotExport
from trlpatch.options import CACHE_DIR, read_directory

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"
TREE_SHA256 = "8760034a98638c804ee94dac0e06a191ce049a9dbdbe33fc8e2e9adceb4da4b0"
"""Of the unpacked files, so that what runs is what was pinned, whoever wrote to the cache since."""

_INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
_WANTED = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")
BACKEND = "scikit-build-core"
"""What pip imports to read the metadata of the sdist; nothing is built with it."""


def cache_folder() -> Path:
    """Return where converters are kept: below `TRLPATCH_CACHE_DIR`, or the user's cache directory."""
    import platformdirs

    root = read_directory(CACHE_DIR) or platformdirs.user_cache_path("trlpatch", appauthor=False)
    return root.absolute() / "llama.cpp"


def converter_files() -> Path:
    """Return the folder with convert_hf_to_gguf.py, conversion/ and gguf-py/; fetches 77 MB the first time.

    A file `llama_cpp_python-0.3.36.tar.gz` that lies in the cache folder is taken instead of a download.

    Raises:
        CannotExport: pip cannot fetch it, or it is another file than the pinned one.
    """
    folder = cache_folder()
    ready = folder / VERSION
    if ready.is_dir():
        if tree_hash(ready) == TREE_SHA256:
            return ready
        shutil.rmtree(ready)  # written to, or half removed: take it from the sdist again
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as scratch, _sdist(folder) as sdist:
            unpacked = _unpack(sdist, Path(scratch) / "files")
            found = tree_hash(unpacked)
            if found != TREE_SHA256:
                raise CannotExport(f"unpacking {sdist.name}: expected files with hash {TREE_SHA256}, found {found}")
            with contextlib.suppress(OSError):  # another process was first, with the same files
                unpacked.rename(ready)
    except OSError as error:
        raise CannotExport(
            f"keeping llama.cpp's converter in {str(folder)!r}: {error}; {CACHE_DIR} names another directory"
        ) from error
    return ready


def tree_hash(folder: Path) -> str:
    """Return the SHA-256 of all files below, with their names; compiled modules do not count."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def _sdist(folder: Path) -> Iterator[Path]:
    """Yield the pinned sdist: one that somebody put there, or a download that is deleted afterwards."""
    placed = folder / SDIST
    if placed.is_file():
        yield _checked(placed)
        return
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        yield _checked(_download(Path(scratch)))


def _checked(path: Path) -> Path:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise CannotExport(f"reading {str(path)!r}: expected SHA-256 {SHA256}, found {found}; delete it and try again")
    return path


def _download(scratch: Path) -> Path:
    """Fetch the sdist with pip.

    pip asks the build backend for the metadata of what it downloads, in an environment into which it would first
    install all that a build needs (cmake, ninja). Without that isolation the backend alone is enough.
    """
    pins = scratch / "requirements.txt"
    pins.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    environ = dict(os.environ)
    if importlib.util.find_spec("scikit_build_core") is None:
        backend = scratch / "backend"
        _pip(["install", "--quiet", "--target", str(backend), BACKEND], environ)
        environ["PYTHONPATH"] = os.pathsep.join([str(backend), *filter(None, [environ.get("PYTHONPATH")])])
    fetch = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    _pip([*fetch, "--require-hashes", "--dest", str(scratch), "-r", str(pins)], environ)
    return scratch / SDIST


def _pip(arguments: list[str], environ: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise CannotExport(
            f"fetching llama.cpp's converter, which is in the sdist of llama-cpp-python {VERSION}: pip ended with "
            f"status {done.returncode}. Without a network, fetch it elsewhere with\n"
            f"    pip download --no-deps --no-binary :all: llama-cpp-python=={VERSION}\n"
            f"and put {SDIST} into {str(cache_folder())!r}. What pip said:\n{said}"
        )


def _unpack(sdist: Path, into: Path) -> Path:
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.removeprefix(_INSIDE)
            if name == member.name or not member.isfile() or not name.startswith(_WANTED):
                continue
            source = archive.extractfile(member)
            assert source is not None
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())
    return into
