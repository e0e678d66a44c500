"""The calls of a training script: load a model with its engine, give it an adapter, generate, train."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from trlpatch.loading.lora_targets import LINEARS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from trlpatch.loading.model_types import AdaptedModel, LoadedModel

P = ParamSpec("P")
T = TypeVar("T")

_GIVEN, _IMAGES = "_given", "_images"
"""What the decorators below tell `from_pretrained`, among its keywords."""


def _noting_what_was_given(load: Callable[P, T]) -> Callable[P, T]:
    """Tell `load` which of its parameters the caller gave: a default may give way where a given value may not."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        kwargs[_GIVEN] = frozenset(signature.bind(*args, **kwargs).arguments)
        return load(*args, **kwargs)

    return call


def _reading_images(load: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(load)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        kwargs[_IMAGES] = True
        return load(*args, **kwargs)

    return call


class FastLanguageModel:
    """Loads a causal language model with a vLLM engine in this process, ready for TRL's trainers.

    from trlpatch import FastLanguageModel
    model, tokenizer = FastLanguageModel.from_pretrained("Qwen/Qwen2.5-7B-Instruct", load_in_4bit=False)
    from trl import GRPOConfig, GRPOTrainer
    model = FastLanguageModel.get_peft_model(model, r=16)
    GRPOTrainer(model=model, processing_class=tokenizer, ...).train()
    """

    @staticmethod
    @_noting_what_was_given
    def from_pretrained(
        model_name: str | os.PathLike[str] = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        fast_inference: bool = True,
        gpu_memory_utilization: float = 0.5,
        max_lora_rank: int = 64,
        disable_log_stats: bool = True,
        token: str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        *,
        float8_kv_cache: bool = False,
        load_in_fp8: bool = False,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        patch_trl: bool = True,
        **kwargs: Any,
    ) -> tuple[LoadedModel, PreTrainedTokenizerBase]:
        """Return (model, tokenizer): a transformers model that carries its engine, and a tokenizer that pads left.

        The engine is built first, in this process. Then the transformers model is built over the engine's weights
        where both can use the same memory (16-bit dense models on one device), else it is loaded beside it; the
        log-probabilities of both are compared. The model has `vllm_engine`, `fast_generate`, `load_lora` and
        `save_lora`. If loading fails or is interrupted, nothing of it is left behind. The caller's random state stays
        as it is.

        A PEFT adapter is loaded over its base model, trainable, and rollouts carry it: `model_name` is its directory
        or id, with PEFT's `revision` and `subfolder`; the model is a PEFT model then.

        Args:
            model_name: a directory, or the id of a model on the hub; of a model or of a PEFT adapter.
            max_seq_length: prompt and completion together, in tokens.
            dtype: of engine and trainer; None takes the checkpoint's, or the half precision of the device.
            load_in_4bit: bitsandbytes nf4 in engine and trainer, each with its own copy.
            fast_inference: False builds no engine: transformers generates.
            gpu_memory_utilization: as in vLLM: the share of the device's whole memory for weights, activations and KV
                cache of the engine.
            max_lora_rank: the largest rank of an adapter; rounded up to one that vLLM allows.
            disable_log_stats: vLLM's statistics, not its log.
            token: for private and gated models on the hub.
            use_gradient_checkpointing: True, False, "unsloth", which means True, or "auto": as many layers are
                checkpointed as the memory left free demands, measured in the first training step; same losses.
            float8_kv_cache: KV cache in fp8.
            load_in_fp8: the engine's weights in fp8, the trainer's in 16 bits.
            load_in_8bit: the trainer's weights in bitsandbytes' int8, the engine's in 16 bits.
            load_in_16bit: neither is quantized: load_in_4bit=False in another word.
            full_finetuning: train every weight. The engine has no LoRA, and weights of its own that are written
                anew before every rollout; load_in_4bit is off.
            patch_trl: patch TRL before an engine is built, as `PatchFastRL()` would, unless it is patched or not
                installed. It stays patched also if loading fails after that.
            **kwargs: `revision`; `trust_remote_code`; `enable_sleep_mode` (None: TRLPATCH_SLEEP, else on where it can
                be); `share_weights` (None: where it can be; True: or an error; False: never); `lora_layers` ("auto":
                trlpatch's for one adapter where they fit; "trlpatch": or an error; "vllm": vLLM's own); `num_engines`
                (that many engines on Ray actors with GPUs of their own instead, see docs/guides/ray.md;
                gpu_memory_utilization is 0.9 then); any argument of the installed vLLM's `LLM`, and of transformers'
                `from_pretrained`; Unsloth's, see docs/coming-from-unsloth.md.

        Raises:
            UnknownArgument, ConflictingArguments: an argument that nobody knows, or that cannot be followed.
            MissingPackage, CudaRequired, Fp8NeedsEngine: what was asked for needs something that is not there.
            ModelNotFound, LoraNotSupported, NotEnoughMemory, EngineWithoutSleep: found before anything is built.
            EngineBuildFailed: vLLM failed, with its reason.
            CannotShare: share_weights=True, and they cannot be.
            NotEnoughResources, EngineInitFailed: with num_engines, GPUs are missing or an engine did not come up.
            EngineMismatch: engine and model do not compute the same.
            AdapterNotExpressible: the engine shares its weights and cannot serve the adapter of `model_name`.
            PatchError and others of `PatchFastRL`: TRL is installed and cannot be patched; nothing was loaded.
        """
        from trlpatch.loading.load_config import parse_arguments

        given, images = kwargs.pop(_GIVEN), kwargs.pop(_IMAGES, False)
        config = parse_arguments(
            {
                "model_name": model_name,
                "max_seq_length": max_seq_length,
                "dtype": dtype,
                "load_in_4bit": load_in_4bit,
                "fast_inference": fast_inference,
                "gpu_memory_utilization": gpu_memory_utilization,
                "max_lora_rank": max_lora_rank,
                "disable_log_stats": disable_log_stats,
                "token": token,
                "use_gradient_checkpointing": use_gradient_checkpointing,
                "float8_kv_cache": float8_kv_cache,
                "load_in_fp8": load_in_fp8,
                "load_in_8bit": load_in_8bit,
                "load_in_16bit": load_in_16bit,
                "full_finetuning": full_finetuning,
                "images": images,
                "patch_trl": patch_trl,
            },
            kwargs,
            given,
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
    ) -> AdaptedModel:
        """Return the model with a LoRA adapter (a PEFT model), which the engine is able to serve.

        `random_state` seeds the adapter's initial weights and nothing else. `**kwargs` are fields of peft.LoraConfig,
        and Unsloth's `finetune_attention_modules`, `finetune_mlp_modules` (False takes theirs out of the targets),
        `finetune_language_layers`, `finetune_vision_layers` and `finetune_last_n_layers`. A model that reads images
        has every linear layer of its language model adapted unless told otherwise, and of its vision tower and
        connector with `finetune_vision_layers=True` (the default without an engine, and beside one that was loaded
        with `enable_tower_connector_lora=True`).

        Raises RankAboveEngine for an `r` above the engine's `max_lora_rank`, AdapterNotExpressible for an adapter that
        cannot reach an engine with shared weights, UnknownArgument and ConflictingArguments.
        """
        from trlpatch.loading.adapter import with_adapter

        targets: Any = target_modules
        if target_modules is not LINEARS and not isinstance(target_modules, (str, type(None))):
            targets = list(target_modules)
        settings = {
            "r": r,
            "target_modules": targets,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "bias": bias,
            **kwargs,
        }
        adapted: AdaptedModel = with_adapter(
            model, settings, checkpointing=use_gradient_checkpointing, random_state=random_state
        )
        return adapted

    @staticmethod
    def for_inference(model: T) -> T:
        """Make the model ready to generate with transformers, and return it.

        Evaluation mode, no gradient checkpointing, the KV cache on; its tokenizer pads left. Rollouts of an engine
        need none of it.
        """
        from trlpatch.loading.modes import for_inference

        return for_inference(model)

    @staticmethod
    def for_training(model: T, use_gradient_checkpointing: bool | str = True) -> T:
        """Make the model ready to train, and return it.

        Training mode, gradient checkpointing as given (a choice of layers that was on stays on); its tokenizer pads
        right, as in Unsloth. TRL's online trainers pad their prompts left by themselves.
        """
        from trlpatch.loading.modes import for_training

        return for_training(model, use_gradient_checkpointing)


class FastModel(FastLanguageModel):
    """`FastLanguageModel` for models that read images as well as for text models.

    Of a checkpoint with a vision tower `from_pretrained` returns (model, processor): transformers' image-text-to-text
    model, and the processor that TRL's trainers take as `processing_class`. Its base weights are never shared with
    the engine. Checkpoints that read sound are refused.
    """

    from_pretrained = staticmethod(_reading_images(FastLanguageModel.from_pretrained))


class FastVisionModel(FastModel):
    """The name that Unsloth has for `FastModel` where the model reads images."""


def is_bfloat16_supported() -> bool:
    """Does the current CUDA device compute in bfloat16 (compute capability 8.0 or above)? False without one."""
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8)
