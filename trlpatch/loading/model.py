"""The two calls of a training script: load a model with its engine, give it an adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastLanguageModel:
    """Loads a causal language model with a vLLM engine in this process, ready for TRL's trainers.

    from trlpatch import FastLanguageModel
    model, tokenizer = FastLanguageModel.from_pretrained("Qwen/Qwen2.5-7B-Instruct", load_in_4bit=False)
    from trl import GRPOConfig, GRPOTrainer
    model = FastLanguageModel.get_peft_model(model, r=16)
    GRPOTrainer(model=model, processing_class=tokenizer, ...).train()
    """

    @staticmethod
    def from_pretrained(
        model_name: str | os.PathLike[str] = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        fast_inference: bool = True,
        gpu_memory_utilization: float = 0.5,
        max_lora_rank: int = 64,
        float8_kv_cache: bool = False,
        disable_log_stats: bool = True,
        token: str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        load_in_fp8: bool = False,
        patch_trl: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Return (model, tokenizer): a transformers model that carries its engine, and a tokenizer that pads left.

        The engine is built first, in this process. Then the transformers model is built over the engine's weights
        where both can use the same memory (16-bit dense models on one device), else it is loaded beside it; the
        log-probabilities of both are compared. The model has `vllm_engine`, `fast_generate`, `load_lora` and
        `save_lora`. If loading fails or is interrupted, nothing of it is left behind. The caller's random state stays
        as it is.

        Args:
            model_name: a directory, or the id of a model on the hub.
            max_seq_length: prompt and completion together, in tokens.
            dtype: of engine and trainer; None takes the checkpoint's, or the half precision of the device.
            load_in_4bit: bitsandbytes nf4 in engine and trainer, each with its own copy.
            fast_inference: False builds no engine: transformers generates.
            gpu_memory_utilization: as in vLLM: the share of the device's whole memory for weights, activations and KV
                cache of the engine.
            max_lora_rank: the largest rank of an adapter; rounded up to one that vLLM allows.
            float8_kv_cache: KV cache in fp8.
            disable_log_stats: vLLM's statistics, not its log.
            token: for private and gated models on the hub.
            use_gradient_checkpointing: True, False, "unsloth", which means True, or "auto": as many layers are
                checkpointed as the memory left free demands, measured in the first training step; same losses.
            load_in_fp8: the engine's weights in fp8, the trainer's in 16 bits.
            patch_trl: patch TRL before an engine is built, as `PatchFastRL()` would, unless it is patched or not
                installed. It stays patched also if loading fails after that.
            **kwargs: `revision`; `trust_remote_code`; `enable_sleep_mode` (None: TRLPATCH_SLEEP, else on where it can
                be); `share_weights` (None: where it can be; True: or an error; False: never); `lora_layers` ("auto":
                trlpatch's for one adapter where they fit; "trlpatch": or an error; "vllm": vLLM's own); any argument
                of the installed vLLM's `LLM`, and of transformers' `from_pretrained`.

        Raises:
            UnknownArgument, ConflictingArguments: an argument that nobody knows, or that cannot be followed.
            MissingPackage, CudaRequired, Fp8NeedsEngine: what was asked for needs something that is not there.
            ModelNotFound, LoraNotSupported, NotEnoughMemory, EngineWithoutSleep: found before anything is built.
            EngineBuildFailed: vLLM failed, with its reason.
            CannotShare: share_weights=True, and they cannot be.
            EngineMismatch: engine and model do not compute the same.
            PatchError and others of `PatchFastRL`: TRL is installed and cannot be patched; nothing was loaded.
        """
        from trlpatch.loading.load_config import parse_arguments

        config = parse_arguments(
            {
                "model_name": model_name,
                "max_seq_length": max_seq_length,
                "dtype": dtype,
                "load_in_4bit": load_in_4bit,
                "fast_inference": fast_inference,
                "gpu_memory_utilization": gpu_memory_utilization,
                "max_lora_rank": max_lora_rank,
                "float8_kv_cache": float8_kv_cache,
                "disable_log_stats": disable_log_stats,
                "token": token,
                "use_gradient_checkpointing": use_gradient_checkpointing,
                "load_in_fp8": load_in_fp8,
                "patch_trl": patch_trl,
            },
            kwargs,
        )
        if config.patch_trl and config.fast_inference:
            from trlpatch.runtime.automatic import patch_for_engine

            patch_for_engine()
        from trlpatch.engine.build import random_state_kept

        with random_state_kept():  # around the import, too: rich draws a random number when it is imported
            from trlpatch.loading.loading import load

            return load(config)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str | None = LINEARS,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        **kwargs: Any,
    ) -> Any:
        """Return the model with a LoRA adapter (a PEFT model), which the engine is able to serve.

        `random_state` seeds the adapter's initial weights and nothing else. `**kwargs` are fields of peft.LoraConfig.

        Raises RankAboveEngine for an `r` above the engine's `max_lora_rank`, AdapterNotExpressible for an adapter that
        cannot reach an engine with shared weights, UnknownArgument and ConflictingArguments.
        """
        from trlpatch.loading.adapter import with_adapter

        targets = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
        settings = {
            "r": r,
            "target_modules": targets,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "bias": bias,
            **kwargs,
        }
        return with_adapter(model, settings, checkpointing=use_gradient_checkpointing, random_state=random_state)
