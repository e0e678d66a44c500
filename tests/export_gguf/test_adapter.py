"""LoRA adapters as GGUF: scales that llama.cpp does not know are in B; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.export_gguf.test_export import rs_adapter
from trlpatch.errors import CannotExport, ExportMismatch
from trlpatch.export.gguf import adapter as module
from trlpatch.export.gguf import export_adapter_gguf, export_gguf

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("converter")]


def test_rslora_and_patterns_run_as_in_peft(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = export_gguf(qwen, tmp_path / "base.gguf", "f32", tokenizer_pre="qwen2", verify=False).paths[0]
    adapter = rs_adapter(qwen, tmp_path / "adapter")
    done = export_adapter_gguf(adapter, tmp_path / "adapter.gguf", base_gguf=base)
    assert done.verified, done
    assert done.files[0].verdict.max_diff is not None
    assert done.files[0].verdict.max_diff < 1e-4
    monkeypatch.setattr(module, "_scale", lambda config, name, rank: config["lora_alpha"] / rank)
    with pytest.raises(ExportMismatch, match="is it an f32 GGUF of the adapter's base"):
        export_adapter_gguf(adapter, tmp_path / "wrong.gguf", base_gguf=base)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "adapter.gguf", "base.gguf"}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 12 / 8),
        ({"use_rslora": True}, 12 / 8**0.5),
        ({"alpha_pattern": {"v_proj": 2}}, 12 / 8),
        ({"alpha_pattern": {"q_proj": 2}}, 2 / 8),
        ({"alpha_pattern": {r"layers\.0\..*q_proj": 2}, "use_rslora": True}, 2 / 8**0.5),
    ],
)
def test_scales_are_folded_once(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(8, 16), f"{stem}.lora_B.weight": torch.ones(4, 8)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 8, "lora_alpha": 12, "peft_type": "LORA", **config})
    )
    module.fold_scales(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (b,) = load_file(tmp_path / "adapter_model.safetensors")[f"{stem}.lora_B.weight"].unique().tolist()
    assert b * saved["lora_alpha"] / 8 == pytest.approx(scale)
    assert (saved["use_rslora"], saved["alpha_pattern"]) == (False, {})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
    ],
)
def test_what_is_not_a_and_b_is_refused(qwen: Path, tmp_path: Path, more: dict[str, Any], says: str) -> None:
    adapter = rs_adapter(qwen, tmp_path / "adapter", **more)
    with pytest.raises(CannotExport, match=says):
        export_adapter_gguf(adapter, tmp_path / "adapter.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize(
    ("out", "outtype"), [("adapter", "f32"), ("adapter.gguf", "q4_k_m"), ("no/adapter.gguf", "f32")]
)
def test_targets_and_types_are_checked_first(tmp_path: Path, out: str, outtype: str) -> None:
    with pytest.raises(CannotExport):
        export_adapter_gguf(tmp_path, tmp_path / out, outtype)
