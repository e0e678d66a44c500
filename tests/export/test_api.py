"""Unsloth's calls on models, and the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.export.kinds import Kind, adapted, base_model
from trlpatch.cli import cli
from trlpatch.errors import CannotExport, SharedWeights, UnknownArgument

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

PLAIN = Kind("plain", {"target_modules": ["q_proj", "down_proj"]})


@pytest.fixture
def model(tmp_path: Path) -> Any:
    from trlpatch.export.api import attach_export
    from trlpatch.policy.adapter import base_of

    made = adapted(tmp_path / "base", PLAIN)
    attach_export(base_of(made))
    return made


def test_the_methods_are_seen_through_peft_and_write(model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tmp_path / "base")
    words.chat_template = "{{ messages }}"
    done = model.save_pretrained_merged(
        tmp_path / "merged", words, save_method="merged_16bit", maximum_memory_usage=0.5
    )
    assert (done.dtype, done.directory) == ("bfloat16", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"
    assert str(
        next(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").parameters()).dtype
    ).endswith("16")
    model.save_pretrained_merged(tmp_path / "lora", words, save_method="lora")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {one.name for one in (tmp_path / "lora").iterdir()}
    again = model.save_pretrained_merged(tmp_path / "lora", words, "LoRA")
    assert (again.dtype, "survival" in repr(done), "log-probabilities" in str(done)) == ("float32", False, True)
    assert model.save_pretrained_merged(tmp_path / "no", is_main_process=False) is None
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_followed_is_refused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for options, error, what in (
        ({"save_method": "merged_4bit"}, CannotExport, "bitsandbytes"),
        ({"save_method": "merged"}, CannotExport, "save_method="),
        ({"tokenizer": "words"}, CannotExport, "tokenizer='words'"),
        ({"tokenizer": "words", "save_method": "lora"}, CannotExport, "tokenizer='words'"),
        ({"save_method": None}, CannotExport, "save_method=None"),
        ({"save_method": ["lora"]}, CannotExport, "save_method="),
        ({"save_method": "lora", "revision": "v2"}, CannotExport, "revision="),
        ({"safe_serialization": False}, CannotExport, "safetensors"),
        ({"state_dict": {}}, CannotExport, "state_dict"),
        ({"max_shrd_size": 1}, UnknownArgument, "max_shrd_size"),
        ({"base": "elsewhere"}, CannotExport, "has its base weights itself"),
        ({"adapter": "other"}, CannotExport, "this model has default"),
    ):  # fmt: skip
        with pytest.raises(error, match=what):
            model.save_pretrained_merged(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_upload_is_what_was_compared(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    seen: dict[str, Any] = {}

    class Repo:
        repo_id = "me/model"

    def upload(self: HfApi, *, repo_id: str, folder_path: str, **commit: Any) -> str:
        seen.update(repo_id=repo_id, files={one.name for one in Path(folder_path).iterdir()}, **commit)
        return "https://address"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: Repo())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert (
        model.push_to_hub_merged("model", None, save_method="merged_16bit", token="t", private=True)
        == "https://address"
    )
    assert seen["repo_id"] == "me/model"
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= seen["files"]


def test_shared_weights_are_read_and_stay_as_they_are(model: Any, tmp_path: Path) -> None:
    import torch

    from trlpatch.engine.sharing import protect, unprotect
    from trlpatch.policy.adapter import base_of

    base = base_of(model)
    base.requires_grad_(False)
    protect(base)
    try:
        with pytest.raises(SharedWeights):
            model.merge_and_unload()
        before = {name: (one.data_ptr(), one.clone()) for name, one in model.state_dict().items()}
        done = model.save_pretrained_merged(tmp_path / "out", dtype="float32")
        assert "log-probabilities" in done.verified
        after = model.state_dict()
        assert all(
            after[name].data_ptr() == at and torch.equal(after[name], one) for name, (at, one) in before.items()
        )
    finally:
        unprotect(base)


def test_a_model_that_is_merged_or_has_two_adapters_is_refused(model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    from trlpatch.export.opening import open_source

    model.merge_adapter()
    with pytest.raises(CannotExport, match="merged into its base weights already"):
        open_source(model)
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(CannotExport, match="2 adapters are active"):
        open_source(model)
    assert open_source(model, adapter="second").kinds == {"lora": 2}


def test_a_generation_config_that_transformers_refuses_is_made_one_that_it_saves(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    from trlpatch.export.api import save_pretrained_merged

    made = base_model(tmp_path / "base", PLAIN)
    made.generation_config.temperature = 0.7
    done = save_pretrained_merged(made, tmp_path / "out")
    assert done is not None
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.temperature, found.do_sample) == (0.7, True)


def test_the_command_line_exports_a_checkpoint(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run" / "checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    where, out = str(tmp_path / "run" / "checkpoint-3"), str(tmp_path / "out")
    shown = CliRunner().invoke(cli, ["export", "merged", where, "--out", out, "--dtype", "float16"])
    assert shown.exit_code == 0, shown.output
    for text in ("parameters in float16", "log-probabilities", "of the adapter's change", " s\n"):
        assert text in shown.output
    told = CliRunner().invoke(cli, ["export", "merged", where, "--out", out, "--json", "--verify", "none"])
    assert json.loads(told.output)["dtype"] == "bfloat16"
    shown = CliRunner().invoke(cli, ["export", "adapter", where, "--out", str(tmp_path / "adapter")])
    assert shown.exit_code == 0, shown.output
    assert "optimizer.pt" not in {one.name for one in (tmp_path / "adapter").iterdir()}
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path / "named", selected_adapters=["second"])
    refused = CliRunner().invoke(cli, ["export", "merged", str(tmp_path / "named"), "--out", out])
    assert "named/second', for one" in str(refused.exception)
    refused = CliRunner().invoke(cli, ["export", "merged", str(tmp_path / "run"), "--out", out])
    assert isinstance(refused.exception, CannotExport)
    assert "checkpoint-3" in str(refused.exception)


def test_a_base_that_is_quantized_or_absent_is_refused(model: Any, tmp_path: Path) -> None:
    from trlpatch.export.opening import open_source

    model.save_pretrained(tmp_path / "adapter")
    named = tmp_path / "adapter" / "adapter_config.json"
    kept = named.read_text()
    named.write_text(json.dumps({**json.loads(kept), "base_model_name_or_path": "../base"}))
    with pytest.raises(CannotExport, match=r"'\.\./base', which its adapter_config\.json names.*counts from .*base="):
        open_source(tmp_path / "adapter")
    named.write_text(kept)
    config = tmp_path / "base" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(CannotExport, match=r"quantized \(bitsandbytes\).*base="):
        open_source(tmp_path / "adapter")
    config.unlink()
    with pytest.raises(CannotExport, match="base="):
        open_source(tmp_path / "adapter", base=str(tmp_path / "elsewhere" / "base"))
