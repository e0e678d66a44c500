"""The converter's files: fetched once, pinned, taken anew when they are not what was pinned."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from trlpatch.errors import CannotExport
from trlpatch.export.gguf import converter_files as module
from trlpatch.export.gguf.converter_files import SDIST, VERSION, cache_folder, converter_files, tree_hash


def sdist(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-{VERSION}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pin a small sdist, put it where a user would, and allow no pip; the cache folder."""
    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(tmp_path / "cache"))
    folder = cache_folder()
    folder.mkdir(parents=True)
    inside = "vendor/llama.cpp/"
    sdist(
        folder / SDIST,
        {
            f"{inside}convert_hf_to_gguf.py": "one",
            f"{inside}conversion/base.py": "two",
            f"{inside}gguf-py/gguf/__init__.py": "three",
            f"{inside}src/llama.cpp": "not wanted",
            f"{inside}../../escape.py": "not wanted",
            "setup.py": "not wanted",
        },
    )
    wanted = tmp_path / "wanted"
    for name, text in (
        ("convert_hf_to_gguf.py", "one"),
        ("conversion/base.py", "two"),
        ("gguf-py/gguf/__init__.py", "three"),
    ):
        (wanted / name).parent.mkdir(parents=True, exist_ok=True)
        (wanted / name).write_text(text)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256((folder / SDIST).read_bytes()).hexdigest())
    monkeypatch.setattr(module, "TREE_SHA256", tree_hash(wanted))
    monkeypatch.setattr(module, "_download", lambda scratch: pytest.fail("nothing is to be downloaded"))
    return folder


def test_wanted_files_are_unpacked_and_nothing_else(pinned: Path) -> None:
    ready = converter_files()
    assert ready == pinned / VERSION
    files = {path.relative_to(ready).as_posix() for path in ready.rglob("*") if path.is_file()}
    assert files == {"convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py"}
    assert {path.name for path in pinned.iterdir()} == {VERSION, SDIST}


def test_files_that_were_written_to_are_taken_anew(pinned: Path) -> None:
    ready = converter_files()
    (pinned / SDIST).rename(pinned / "elsewhere")
    assert converter_files() == ready  # without the sdist
    (pinned / "elsewhere").rename(pinned / SDIST)
    (ready / "conversion/base.py").write_text("something else")
    assert (converter_files() / "conversion/base.py").read_text() == "two"


def test_compiled_modules_do_not_count(pinned: Path) -> None:
    compiled = converter_files() / "conversion/__pycache__/base.pyc"
    compiled.parent.mkdir()
    compiled.write_bytes(b"x")
    (pinned / SDIST).unlink()
    assert converter_files().is_dir()


def test_another_sdist_is_refused(pinned: Path) -> None:
    (pinned / SDIST).write_bytes(b"another")
    with pytest.raises(CannotExport, match="expected SHA-256"):
        converter_files()
    assert not (pinned / VERSION).exists()


def test_without_a_network_the_error_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(tmp_path / "cache"))
    asked: list[list[str]] = []

    def offline(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    monkeypatch.setattr(module.subprocess, "run", offline)
    with pytest.raises(CannotExport) as caught:
        converter_files()
    assert f"pip download --no-deps --no-binary :all: llama-cpp-python=={VERSION}" in str(caught.value)
    assert str(tmp_path / "cache" / "llama.cpp") in str(caught.value)
    assert "no network" in str(caught.value)
    assert len(asked) == 1
    assert list((tmp_path / "cache" / "llama.cpp").iterdir()) == []
