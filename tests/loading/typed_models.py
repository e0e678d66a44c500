"""Checked by mypy, never run: what type checkers and editors know about a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

from trlpatch import FastLanguageModel, FastModel

if TYPE_CHECKING:
    from trlpatch.engine.protocols import LoraRequest, RolloutEngine
    from trlpatch.loading.model_types import AdaptedModel, LoadedModel


def typed() -> None:
    loaded, tokenizer = FastLanguageModel.from_pretrained("model", 1024, load_in_4bit=False, max_num_seqs=8)
    assert_type(loaded, LoadedModel)
    assert_type(loaded.vllm_engine, RolloutEngine)
    assert_type(loaded.load_lora("saved", load_tensors=False), LoraRequest | None)
    assert_type(FastModel.from_pretrained("model")[0], LoadedModel)
    assert_type(FastLanguageModel.for_inference(loaded), LoadedModel)

    adapted = FastLanguageModel.get_peft_model(loaded, r=8, finetune_mlp_modules=False)
    assert_type(adapted, AdaptedModel)
    assert_type(adapted.fast_generate(["text"], lora_request=None), Any)
    assert_type(adapted.save_lora("saved"), None)
    adapted.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit")
    adapted.push_to_hub_merged("me/model", tokenizer, save_method="lora", token="...")
    adapted.save_pretrained_gguf("gguf", tokenizer, quantization_method="q4_k_m")
    adapted.push_to_hub_gguf("me/model", tokenizer, quantization_method=["q4_k_m", "q8_0"], token="...")

    adapted.save_lora()  # type: ignore[call-arg]
    adapted.save_pretrained_merged("merged", sav_method="lora", save_method=1)  # type: ignore[arg-type]
    FastLanguageModel.from_pretrained("model", load_in_4bit="no")  # type: ignore[arg-type]
