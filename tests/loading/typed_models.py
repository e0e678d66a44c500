"""Checked by mypy, never run: what type checkers and editors know about a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

from trlpatch import FastLanguageModel, FastModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trlpatch.engine.protocols import LoraRequest, RolloutEngine
    from trlpatch.loading.model_types import AdaptedModel, EngineModel, LoadedModel


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
    without_the_libraries(loaded, tokenizer)
    without_the_libraries(adapted, tokenizer)
    FastLanguageModel.from_pretrained("model", load_in_4bit="no")  # type: ignore[arg-type]


def without_the_libraries(model: EngineModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The base classes are Any where transformers and PEFT are not installed, and would hide a missing method."""
    model.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit")
    model.push_to_hub_merged("me/model", tokenizer, save_method="lora", token="...")
    model.save_pretrained_gguf("gguf", tokenizer, quantization_method="q4_k_m")
    model.push_to_hub_gguf("me/model", tokenizer, quantization_method=["q4_k_m", "q8_0"], token="...")
    model.save_lora("saved", adapter_name="default")
    model.save_lora()  # type: ignore[call-arg]
    model.save_pretrained_merged("merged", save_method=1)  # type: ignore[arg-type]
    model.save_merged("merged")  # type: ignore[attr-defined]
