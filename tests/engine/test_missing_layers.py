"""What is said of modules that the engine has no LoRA layer for. Needs neither torch nor vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trlpatch.engine.adapter_sync import missing_layers


class Mapper:
    def apply_list(self, values: list[str]) -> list[str]:
        renamed = [value.replace("model.language_model.", "language_model.model.") for value in values]
        return [value.replace("model.visual.", "visual.") for value in renamed]


def model(**mapping: Any) -> Any:
    keys = {"tower_model": ["visual."], "connector": ["visual.merger."], **mapping}
    return SimpleNamespace(get_mm_mapping=lambda: SimpleNamespace(**keys), hf_to_vllm_mapper=Mapper())


PATHS = [
    f"model.language_model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
]
TOWER = [f"visual.blocks.{layer}.attn.qkv" for layer in range(6)]


def test_layers_of_the_tower_say_how_they_are_had() -> None:
    said = missing_layers.in_words(model(), TOWER, [*PATHS, *(f"model.{name}" for name in TOWER)])
    assert "visual.blocks.3.attn.qkv and 2 more: layers of the vision tower or its connector" in said
    assert "enable_tower_connector_lora=True" in said
    assert said.endswith(r"target_modules=r'model\.language_model\.layers\..*\.(q_proj|up_proj)'")


def test_other_layers_and_text_models_are_named_alone() -> None:
    alone = "the engine's model has no LoRA layer for router"
    assert missing_layers.in_words(model(), ["router"], PATHS) == alone
    assert missing_layers.in_words(SimpleNamespace(), ["router"], PATHS) == alone  # type: ignore[arg-type]


def test_an_adapter_of_the_tower_alone() -> None:
    said = missing_layers.in_words(model(), TOWER, [])
    assert said.endswith("alone, with target_modules that match its layers only")
