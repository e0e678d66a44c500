"""The two calls that users have: Unsloth's method on a model, and the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trlpatch.cli import cli
from trlpatch.errors import MissingPackage, UnknownArgument

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("converter"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def model(qwen: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trlpatch.export.api import attach_export

    base = AutoModelForCausalLM.from_pretrained(qwen, dtype="auto")
    attach_export(base)
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"]))


def test_the_method_on_a_model_writes_each_type_and_runs_it(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trlpatch.export.gguf import export

    room: list[Path] = []
    monkeypatch.setattr(export, "need_disk", lambda folder, *rest: room.append(folder))
    done = model.save_pretrained_gguf(
        tmp_path / "out", None, quantization_method=["q4_k_m", "Q8_0"], maximum_memory_usage=0.5, tokenizer_pre="qwen2"
    )
    assert [path.name for path in done.paths] == ["tiny-qwen-q4_k_m.gguf", "tiny-qwen-q8_0.gguf"]
    assert done.verified, done
    assert room == [tmp_path / "out"]  # what the message names
    with pytest.raises(UnknownArgument, match=r"save_pretrained_gguf: dtype= .*tokenizer_pre"):
        model.save_pretrained_gguf(tmp_path / "out", None, dtype="float16")
    assert model.save_pretrained_gguf(tmp_path / "no", is_main_process=False) is None


@pytest.mark.usefixtures("on_one_stack")
def test_the_command_says_sizes_seconds_and_whether_the_files_ran(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "checkpoint-3")
    words = ["export", "gguf", str(tmp_path / "checkpoint-3"), "--tokenizer-pre", "qwen2", "--out"]
    told = CliRunner().invoke(cli, [*words, str(tmp_path / "a"), "--quant", "q4_k_m,f16", "--quant", "q8_0", "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [(one["type"], one["verified"]) for one in found["files"]] == [
        ("q4_k_m", True), ("f16", True), ("q8_0", True)
    ]  # fmt: skip
    assert all(Path(one["path"]).stat().st_size == one["bytes"] for one in found["files"])
    assert found["seconds"] > 0
    shown = CliRunner().invoke(cli, [*words, str(tmp_path / "b"), "--type", "f16", "--no-verify"])
    assert shown.exit_code == 0, shown.output
    for text in ("tiny-qwen-f16.gguf: ", " MiB, NOT VERIFIED: verify=False", " s\n"):
        assert text in shown.stdout


def test_what_a_child_is_missing_is_told_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from multiprocessing.connection import Connection, Pipe

    from trlpatch.export.gguf.pipe import receive, run_child

    def work(pipe: Connection) -> None:
        raise MissingPackage("quantizing to Q4_K: pip install it")

    ours, theirs = Pipe()
    monkeypatch.setattr("sys.argv", ["child", str(os.dup(theirs.fileno()))])
    run_child(work)
    assert receive(ours) == {"refused": "quantizing to Q4_K: pip install it"}
