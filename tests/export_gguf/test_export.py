"""Exports that are run: llama.cpp on the files against transformers, and what is refused before or removed after."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.export_gguf.conftest import SHAPE, save
from trlpatch.errors import CannotExport, ExportMismatch
from trlpatch.export.gguf import checks, export_gguf, verify
from trlpatch.versions import pip_install

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("converter")]


@pytest.fixture(scope="module")
def adapter(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An rsLoRA adapter with patterns on it, whose effect is as large as the logits."""
    return rs_adapter(qwen, tmp_path_factory.mktemp("adapters") / "rs")


def rs_adapter(base: Path, folder: Path, **more: Any) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {
        "r": 8,
        "lora_alpha": 12,
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 3},
        "rank_pattern": {"v_proj": 4},
    }
    adapted = get_peft_model(
        model, LoraConfig(**{**config, "target_modules": ["q_proj", "v_proj", "down_proj"], **more})
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_converted_and_run_in_each_type(adapter: Path, tmp_path: Path, dequantized: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    done = export_gguf(
        adapter,
        tmp_path / "made",
        ["f32", "q8_0", "q4_k_m"],
        tokenizer_pre="qwen2",
        name="tiny",
        progress=lambda *one: seen.append(one),
    )
    assert [path.name for path in done.paths] == ["tiny-f32.gguf", "tiny-q8_0.gguf", "tiny-q4_k_m.gguf"]
    assert sorted((tmp_path / "made").iterdir()) == sorted(done.paths)
    assert done.verified, done
    exact, eight, four = (one.verdict for one in done.files)
    assert exact.max_diff is not None
    assert exact.max_diff < 1e-4
    assert exact.kl is not None
    assert eight.kl is not None
    assert four.kl is not None
    assert exact.kl < eight.kl < four.kl
    assert {what for what, _, _ in seen} == {"writing f32, q8_0, q4_k_m", "running the files"}
    assert all(done <= of for _, done, of in seen)
    dequantized_file(dequantized, done.paths[2], tmp_path / "f32.gguf")
    _runs_as_rounded(adapter, tmp_path, tmp_path / "f32.gguf", done.paths[2], dequantized)


def dequantized_file(gguf: Any, path: Path, into: Path) -> None:
    """Write the weights of a file in float32: llama.cpp then rounds no activations."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(into, "qwen2")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.reshape([int(one) for one in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _runs_as_rounded(adapter: Path, scratch: Path, plain: Path, mixed: Path, gguf: Any) -> None:
    """With activations in float32, llama.cpp computes what transformers computes with the rounded weights."""
    from trlpatch.export.gguf.converter_files import converter_files
    from trlpatch.export.gguf.pipe import Child
    from trlpatch.export.gguf.weights import Weights
    from trlpatch.export.opening import open_source

    source = open_source(adapter)
    settings = scratch / "settings"
    settings.mkdir()
    source.save_settings(settings)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(mixed).tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}  # fmt: skip
    rounding = {"model.embed_tokens.weight": kinds["token_embd.weight"]} | {
        f"model.layers.{layer}.{theirs}.weight": kinds[f"blk.{layer}.{ours}.weight"]
        for layer in range(SHAPE["num_hidden_layers"])
        for ours, theirs in names.items()
    }
    weights, tokens = Weights(source), verify.prompt(settings)
    shapes = {name: list(shape) for name, shape in weights.shapes.items()}
    job = {"shapes": shapes, "folder": str(settings), "rounding": rounding, "tokens": tokens}
    with Child(verify.CHILD, [converter_files() / "gguf-py"], what="the reference") as child:
        wanted = verify.logits_of(child, job, weights, scratch)
    found = verify.run_file(plain, tokens, scratch)
    assert abs(found - wanted).max() < 1e-3


def test_a_live_model_is_exported_without_llama_cpp_to_run_it(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(verify, "xllamacpp_library", lambda: None)
    done = export_gguf(
        AutoModelForCausalLM.from_pretrained(qwen).bfloat16(),
        tmp_path / "one.gguf",
        "not_quantized",
        tokenizer=AutoTokenizer.from_pretrained(qwen),
        tokenizer_pre="qwen2",
    )
    assert [(one.path, one.type, one.verdict.verified) for one in done.files] == [
        (tmp_path / "one.gguf", "bf16", False)
    ]
    assert not done.verified
    assert pip_install("gguf") in str(done)
    assert "not verified: xllamacpp is not installed" in caplog.text


def test_a_graph_that_is_another_model_is_found_by_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 32}
    save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts, norm_topk_prob=False)), tmp_path / "model")
    with pytest.raises(CannotExport, match=r"(?s)norm_topk_prob=False.*accept=\['norm_topk_prob'\]") as caught:
        export_gguf(tmp_path / "model", tmp_path / "out", "f32", tokenizer_pre="qwen2")
    assert "\n- norm_topk_prob" in str(caught.value)
    monkeypatch.setattr(checks, "_experts", lambda config: [])
    with pytest.raises(ExportMismatch, match=r"llama\.cpp computes another model\. Nothing was kept"):
        export_gguf(tmp_path / "model", tmp_path / "out", "f32", tokenizer_pre="qwen2")
    assert not (tmp_path / "out").exists()


def test_what_the_child_refuses_is_told_and_leaves_nothing(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotExport, match="tokenizer_pre='qwen2' for Qwen's pattern"):
        export_gguf(qwen, tmp_path / "out" / "deep", "q8_0")
    with pytest.raises(CannotExport, match="did you mean 'qwen2'"):
        export_gguf(qwen, tmp_path / "out" / "deep", "q8_0", tokenizer_pre="qwen-2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("on_one_stack")
def test_weights_that_float16_does_not_hold_are_refused(qwen: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e6
    options: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(qwen),
        "tokenizer_pre": "qwen2",
        "verify": False,
    }
    with pytest.raises(
        CannotExport, match=r"'blk.1.ffn_up.weight' has weights up to 1e\+06, and float16 ends at 65504"
    ):
        export_gguf(model, tmp_path / "f16.gguf", "f16", **options)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(CannotExport, match="infinite or not a number"):
        export_gguf(model, tmp_path / "f16.gguf", "bf16", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("on_one_stack")
def test_an_interrupted_export_ends_its_child_and_leaves_nothing(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(b"an earlier export")

    def interrupt(what: str, done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(qwen, tmp_path / "one.gguf", "f32", tokenizer_pre="qwen2", progress=interrupt)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an earlier export"]


CONVERT = """\
import runpy, sys
converter, source, out = sys.argv[1:]
sys.path[:0] = [converter, converter + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", out, "--outtype", "q8_0"]
runpy.run_path(converter + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.mark.usefixtures("on_one_stack")
def test_a_converter_of_its_own_makes_the_same_file(
    qwen: Path, tmp_path: Path, converter: Path, dequantized: Any
) -> None:
    """q8_0 in one pass from float32 is what convert_hf_to_gguf.py makes of the directory, byte for byte."""
    done = export_gguf(qwen, tmp_path / "ours.gguf", "q8_0", tokenizer_pre="qwen2", name="tiny-qwen", verify=False)
    # In a process of its own: its gguf is newer than the released one, which this process has.
    words = [sys.executable, "-c", CONVERT, str(converter), str(qwen), str(tmp_path / "theirs.gguf")]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    ours, theirs = (tensor_bytes(dequantized, path) for path in (done.paths[0], tmp_path / "theirs.gguf"))
    assert ours == theirs
    assert done.paths[0].read_bytes()[:4] == b"GGUF"
    assert struct.unpack("<I", done.paths[0].read_bytes()[4:8]) == (3,)


def tensor_bytes(gguf: Any, path: Path) -> dict[str, tuple[str, bytes]]:
    return {one.name: (one.tensor_type.name, one.data.tobytes()) for one in gguf.GGUFReader(path).tensors}


def test_a_source_with_a_sliding_window_can_be_accepted(qwen: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "window"
    shutil.copytree(qwen, folder)
    config = json.loads((folder / "config.json").read_text())
    kinds = ["sliding_attention"] * SHAPE["num_hidden_layers"]
    config |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0, "layer_types": kinds}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CannotExport, match="no sliding window for Qwen2ForCausalLM: behind 16 tokens"):
        export_gguf(folder, tmp_path / "one.gguf", "f32", tokenizer_pre="qwen2")
    done = export_gguf(folder, tmp_path / "one.gguf", "f32", tokenizer_pre="qwen2", accept=["sliding_window"])
    assert done.verified  # on a prompt of 16 tokens
    assert "context of at most that" in done.notes[0]
