"""TRL in a wheel, and what is not one: an error that names the place, no traceback and no temporary file."""

from __future__ import annotations

import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from trlpatch import errors
from trlpatch.preview import preview

TRAINER = "class GRPOTrainer:\n    def __init__(self, model):\n        pass\n"


def wheel(path: Path, **files: str | bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trl-0.18.2.dist-info/METADATA", "Name: trl\nVersion: 0.18.2\n")
        archive.writestr("trl/__init__.py", "")
        for name, text in {"grpo_trainer": TRAINER, **files}.items():
            archive.writestr(f"trl/trainer/{name}.py", text)
    return path


def test_drift_names_the_file_in_the_wheel(tmp_path: Path) -> None:
    path = wheel(tmp_path / "trl-0.18.2-py3-none-any.whl")
    found = preview(path, ["grpo"])
    assert f"  file     {path}!/trl/trainer/grpo_trainer.py:2\n" in found.drift()
    assert {str(file.source.path) for file in found.files} == {f"{path}!/trl/trainer/grpo_trainer.py"}
    assert str(found.install.root) == f"{path}!/trl"
    assert "trlpatch-" not in repr(found)


def test_what_is_not_python_or_not_utf_8_is_named_in_the_wheel(tmp_path: Path) -> None:
    found = preview(wheel(tmp_path / "a.whl", grpo_trainer="def broken(:\n"), ["grpo"])
    assert f"{tmp_path}/a.whl!/trl/trainer/grpo_trainer.py:1 is not Python" in found.drift()
    with pytest.raises(errors.UnreadableSource, match=r"/b\.whl!/trl/trainer/grpo_trainer\.py:1 is not UTF-8.*0xff"):
        preview(wheel(tmp_path / "b.whl", grpo_trainer=b"\xff"))
    with pytest.raises(errors.UnreadableSource, match=r"/c\.whl!/.* holds a NUL"):
        preview(wheel(tmp_path / "c.whl", grpo_trainer=b"a = 1\0"))


def test_a_byte_order_mark_is_not_part_of_the_source(tmp_path: Path) -> None:
    found = preview(wheel(tmp_path / "a.whl", grpo_trainer=b"\xef\xbb\xbf" + TRAINER.encode()), ["grpo"])
    assert "is not Python" not in found.drift()


def old(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("trl-0.17.0.dist-info/METADATA", "")
        archive.writestr("trl/trainer/__init__.py", "")


def damaged(path: Path) -> None:
    content = bytearray(wheel(path, filler="x = 1\n" * 1000).read_bytes())
    at = content.index(b"trl/trainer/filler.py") + 30
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(content)


def encrypted(path: Path) -> None:
    content = bytearray(wheel(path).read_bytes())
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(magic, at + 1)) >= 0:
            content[at + flags] |= 1
    path.write_bytes(content)


def unknown_compression(path: Path) -> None:
    content = bytearray(wheel(path).read_bytes())
    for magic, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = -1
        while (at := content.find(magic, at + 1)) >= 0:
            content[at + method] = 77
    path.write_bytes(content)


def file_below_a_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("trl.py", "")
        archive.writestr("trl.py/trainer/a.py", "")


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def folder(version: str, *files: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / "trl" / "trainer").mkdir(parents=True)
        if version:
            (path / f"trl-{version}.dist-info").mkdir()
        for file in files:
            (path / "trl" / file).write_bytes(b"\xff\xfe")

    return make


JUNK: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "empty file": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("trl", encoding="utf-8"),
    "start of a zip": lambda path: path.write_bytes(b"PK\x03\x04"),
    "half a wheel": lambda path: path.write_bytes(wheel(path).read_bytes()[:200]),
    "empty zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "damaged": damaged,
    "encrypted": encrypted,
    "unknown compression": unknown_compression,
    "file below a file": file_below_a_file,
    "old": old,
    "pipe": lambda path: os.mkfifo(path),
    "socket": socket_file,
    "device": lambda path: path.symlink_to("/dev/null"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to(path / "nothing"),
    "empty folder": lambda path: path.mkdir(),
    "no version": folder(""),
    "no version that can be read": folder("", "__init__.py"),
    "VERSION that cannot be read": folder("", "VERSION"),
    "unknown version": folder("unknown"),
    "old folder": folder("0.17.0"),
    "sources that cannot be read": folder("1.16.0", "trainer/grpo_trainer.py"),
}


@pytest.mark.parametrize("kind", JUNK)
def test_junk_is_an_error_that_names_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("junk")
    JUNK[kind](path)
    with pytest.raises(errors.TrlpatchError) as raised:
        preview(path)
    assert not isinstance(raised.value, errors.PatchError)
    assert "trlpatch-" not in str(raised.value)
    assert "junk" in str(raised.value) or kind == "unknown version"


@pytest.mark.parametrize("name", ["a" * 5000, "\0", "junk/" * 2000])
def test_a_path_that_no_file_can_have(name: str) -> None:
    with pytest.raises(errors.TrlNotFound):
        preview(Path(name))


def test_a_folder_without_any_trainer_does_not_fit(tmp_path: Path) -> None:
    folder("1.16.0")(tmp_path)
    assert "patches do not fit: distillation, gold, grpo" in preview(tmp_path).fit.verdict
