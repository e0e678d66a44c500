"""What `from_pretrained` and `get_peft_model` return, for type checkers and editors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trlpatch.engine.protocols import LoraRequest, RolloutEngine

    Path = str | os.PathLike[str]


class EngineModel(Protocol):
    """What a loaded model has beside transformers' and PEFT's own."""

    @property
    def vllm_engine(self) -> RolloutEngine:
        """The engine; absent with fast_inference=False."""
        ...

    def fast_generate(self, *args: Any, lora_request: LoraRequest | None = ..., **kwargs: Any) -> Any:
        """vLLM's `generate` with the live adapter; transformers' with fast_inference=False."""
        ...

    def load_lora(self, name: str | None = None, load_tensors: bool | None = None) -> LoraRequest | None:
        """The request for the live adapter, or for one saved in the directory `name`."""
        ...

    def save_lora(self, save_directory: Path, adapter_name: str | None = None) -> None:
        """Save the adapter as PEFT does."""
        ...

    def save_pretrained_merged(
        self,
        save_directory: Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        save_method: str = "merged_16bit",
        **kwargs: Any,
    ) -> Any:
        """Save the model with its adapter merged into the weights."""
        ...

    def push_to_hub_merged(
        self,
        repo_id: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        save_method: str = "merged_16bit",
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the model with its adapter merged into the weights."""
        ...

    def save_pretrained_gguf(
        self,
        save_directory: Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quantization_method: str | list[str] = "fast_quantized",
        **kwargs: Any,
    ) -> Any:
        """Save the merged model as GGUF."""
        ...

    def push_to_hub_gguf(
        self,
        repo_id: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quantization_method: str | list[str] = "fast_quantized",
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the merged model as GGUF."""
        ...


if TYPE_CHECKING:

    class LoadedModel(EngineModel, PreTrainedModel):  # type: ignore[misc]
        """A transformers model with an engine; a PEFT model where an adapter was loaded."""

    class AdaptedModel(EngineModel, PeftModel):  # type: ignore[misc]
        """A PEFT model with an engine."""
