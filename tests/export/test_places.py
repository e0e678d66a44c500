"""Where exports go: never over what they are made from, and nothing half-written whatever ends the process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.export.kinds import Kind, adapted
from trlpatch.errors import CannotExport

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

PLAIN = Kind("plain", {"target_modules": ["q_proj", "down_proj"]})


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """One on an earlier export, the base of a second stage of training."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trlpatch.export import save_pretrained_merged

    save_pretrained_merged(adapted(tmp_path / "first", PLAIN), tmp_path / "base")
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"])
    )
    made.save_pretrained(tmp_path / "run" / "checkpoint-3")
    return made


def test_what_an_export_is_made_from_is_never_replaced(model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from trlpatch.export import save_pretrained_merged

    checkpoint = tmp_path / "run" / "checkpoint-3"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "base")
    written = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    for source, out, method in (
        (model, "base", "merged_16bit"),
        (model, "base", "lora"),
        (model, "link", "merged_16bit"),
        (checkpoint, "base", "merged_16bit"),
        (checkpoint, "run/checkpoint-3", "merged_16bit"),
        (checkpoint, "run", "lora"),
        (checkpoint, ".", "lora"),
        (tmp_path / "base", "base", "merged_16bit"),
    ):
        with pytest.raises(CannotExport, match="is made from"):
            save_pretrained_merged(source, tmp_path / out, save_method=method, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "base", "run", "link"}
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == written
    assert save_pretrained_merged(checkpoint, checkpoint / "merged")  # in it, beside its files
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # no adapter loses its base
    assert save_pretrained_merged(whole, tmp_path / "base")


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_the_current_directory_is_never_replaced(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    from trlpatch.export import save_pretrained_merged

    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(CannotExport, match="the current directory is in it"):
        save_pretrained_merged(model, out, save_method="lora", overwrite=True)
    assert (tmp_path / "a" / "b").is_dir()


def test_a_link_to_another_disk_stays_one(model: Any, tmp_path: Path) -> None:
    from trlpatch.export import save_pretrained_merged

    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for _ in range(2):
        save_pretrained_merged(model, tmp_path / "out", save_method="lora")
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
    assert (tmp_path / "disk" / "out" / "adapter_config.json").is_file()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_the_system_refuses_is_told_and_leaves_nothing(model: Any, tmp_path: Path, number: int) -> None:
    from trlpatch.export import save_pretrained_merged

    def full(what: str, done: int, of: int) -> None:
        raise OSError(number, os.strerror(number))

    before = sorted(tmp_path.iterdir())
    with pytest.raises(CannotExport, match=f"{os.strerror(number)}; nothing was left"):
        save_pretrained_merged(model, tmp_path / "deep" / "out", progress=full)
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotExport, match="file"):
        save_pretrained_merged(model, tmp_path / "file" / "out")
    (tmp_path / "file").unlink()
    assert sorted(tmp_path.iterdir()) == before


_COMMAND = """
import os, signal, sys
from trlpatch.export import merged
number = int(sys.argv.pop())
def end(*args, **options):
    os.kill(os.getpid(), number)
    signal.pause()
merged.verify_export = end
from trlpatch.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing_or_what_the_next_export_removes(model: Any, tmp_path: Path, number: int) -> None:
    from trlpatch.export import save_pretrained_merged

    out = tmp_path / "out"
    words = ["export", "merged", str(tmp_path / "run" / "checkpoint-3"), "--out", str(out), str(int(number))]
    done = subprocess.run([sys.executable, "-c", _COMMAND, *words], check=False, capture_output=True, text=True)
    killed = number == signal.SIGKILL
    assert done.returncode == (-number if killed else 128 + number), done.stderr
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (len(left), out.exists()) == (int(killed), False)
    save_pretrained_merged(model, out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
