"""The load configuration: the arguments of `from_pretrained`, named, in range, and given to whom they concern."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from trlpatch.engine.build import engine_argument_names
from trlpatch.errors import ConflictingArguments, Fp8NeedsEngine, MissingPackage, UnknownArgument
from trlpatch.loading.unsloth_arguments import FOLLOWED, NEUTRAL, take_unsloth_arguments, without_spread
from trlpatch.options import LoraLayers
from trlpatch.versions import installed_version, pip_install, vllm_missing

OWN = frozenset(
    {
        "model_name",
        "max_seq_length",
        "dtype",
        "load_in_4bit",
        "fast_inference",
        "gpu_memory_utilization",
        "max_lora_rank",
        "float8_kv_cache",
        "disable_log_stats",
        "token",
        "use_gradient_checkpointing",
        "load_in_fp8",
        "load_in_8bit",
        "load_in_16bit",
        "full_finetuning",
        "patch_trl",
        "revision",
        "trust_remote_code",
        "enable_sleep_mode",
        "share_weights",
        "lora_layers",
        "num_engines",
    }
)

ALONE = 0.9
"""`gpu_memory_utilization` of engines on devices of their own."""

INSTEAD = {
    "model": "model_name",
    "pretrained_model_name_or_path": "model_name",
    "max_model_len": "max_seq_length",
    "hf_token": "token",
    "use_auth_token": "token",
    "kv_cache_dtype": "float8_kv_cache",
    **dict.fromkeys(("r", "rank", "lora_r", "lora_rank"), "max_lora_rank"),
}
"""Names of vLLM's, transformers' and adapters' own for what has a parameter here."""

OF_THE_MODEL = frozenset(
    {
        "attn_implementation",
        "cache_dir",
        "code_revision",
        "config",
        "device_map",
        "experts_implementation",
        "force_download",
        "generation_config",
        "ignore_mismatched_sizes",
        "key_mapping",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "proxies",
        "quantization_config",
        "state_dict",
        "subfolder",
        "use_kernels",
        "use_safetensors",
        "variant",
        "weights_only",
    }
)
"""Arguments of transformers' `from_pretrained`, which hides most of them in **kwargs."""

SWITCHES = (
    "load_in_4bit",
    "load_in_8bit",
    "load_in_16bit",
    "load_in_fp8",
    "full_finetuning",
    "fast_inference",
    "float8_kv_cache",
    "disable_log_stats",
    "patch_trl",
)

TO_THE_TOKENIZER = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder")


@dataclass(frozen=True)
class LoadConfig:
    """The checked arguments of one `from_pretrained` call.

    Attributes:
        engine: further arguments of `vllm.LLM`.
        model: further arguments of transformers' `from_pretrained`.
        random_state: the seed of the engine, where it is not vLLM's default.
        images: load a checkpoint that reads images as what it is, with its processor.
        without_effect: engine arguments that were given although no engine is built.
        num_engines: how many engines are built on other devices, as Ray actors; None: one in this process.
        why_ranks_separate: what happens to the trainer's weights on several ranks so that they cannot be the engine's.
    """

    model_name: str
    max_seq_length: int
    dtype: Any
    load_in_4bit: bool
    fast_inference: bool
    gpu_memory_utilization: float
    max_lora_rank: int
    float8_kv_cache: bool
    disable_log_stats: bool
    token: str | None
    use_gradient_checkpointing: bool | str
    load_in_fp8: bool
    revision: str | None
    trust_remote_code: bool
    enable_sleep_mode: bool | None
    share_weights: bool | None
    lora_layers: str
    engine: Mapping[str, Any]
    model: Mapping[str, Any]
    load_in_8bit: bool = False
    load_in_16bit: bool = False
    full_finetuning: bool = False
    random_state: int | None = None
    resize_model_vocab: int | None = None
    tokenizer_name: str | None = None
    images: bool = False
    patch_trl: bool = True
    without_effect: tuple[str, ...] = ()
    num_engines: int | None = None
    why_ranks_separate: str | None = None

    @property
    def hub(self) -> dict[str, Any]:
        """What the hub and its cache are asked with."""
        return {"revision": self.revision, "token": self.token, "trust_remote_code": self.trust_remote_code}

    @property
    def of_tokenizer(self) -> dict[str, Any]:
        """What the tokenizer, and the config, are loaded with."""
        return {**self.hub, **{name: self.model[name] for name in TO_THE_TOKENIZER if name in self.model}}

    @property
    def why_separate(self) -> str | None:
        """Why the base weights cannot or shall not be shared, as far as the arguments say; None where they may be."""
        if self.num_engines is not None:
            return "the engines are on devices of their own"
        if self.full_finetuning:
            return "full_finetuning=True trains every weight, and shared ones cannot be trained"
        if self.load_in_8bit:
            return "the trainer's weights are in 8 bits, the engine's are not"
        if self.load_in_4bit:
            return "4-bit weights are quantized by vLLM and by transformers each in its own layout"
        if self.load_in_fp8:
            return "the engine's weights are fp8, the trainer's are not"
        if self.engine.get("quantization") is not None:
            return f"the engine's weights are quantized ({self.engine['quantization']})"
        if self.model.get("quantization_config") is not None:
            return "the trainer's weights are quantized (quantization_config)"
        if self.share_weights is False:
            return "share_weights=False"
        return self.why_ranks_separate


def parse_arguments(
    values: Mapping[str, Any], further: Mapping[str, Any], given: Collection[str] | None = None
) -> LoadConfig:
    """Check the arguments of a `from_pretrained` call without importing torch, transformers or vLLM.

    Args:
        values: the named parameters.
        further: its **kwargs.
        given: which of them the caller gave, where the others are at their defaults; None: all of them.

    Raises:
        UnknownArgument: nobody knows one of the names.
        ConflictingArguments: a value is out of range, or excludes another one.
        Fp8NeedsEngine, MissingPackage: what is asked for needs an engine, or a package that is not installed.
    """
    extra = dict(further)
    named = dict(values)
    named["revision"] = extra.pop("revision", None)
    named["trust_remote_code"] = extra.pop("trust_remote_code", False)
    named["enable_sleep_mode"] = extra.pop("enable_sleep_mode", None)
    named["share_weights"] = extra.pop("share_weights", None)
    named["lora_layers"] = extra.pop("lora_layers", "auto")
    named["num_engines"] = extra.pop("num_engines", None)
    if named["num_engines"] is not None and given is not None and "gpu_memory_utilization" not in given:
        named["gpu_memory_utilization"] = ALONE  # nothing else runs on the engines' devices
    take_unsloth_arguments(named, extra, named.keys() if given is None else given)
    check_values(named)
    fast = bool(named["fast_inference"])
    if without_spread(extra.get("device_map"), engine=fast):
        extra.pop("device_map", None)
    of_model = {name: extra.pop(name) for name in OF_THE_MODEL & extra.keys()}
    known = engine_argument_names()
    _refuse_unknown(extra, known)
    made = LoadConfig(
        **{
            **named,
            "model_name": os.fspath(named["model_name"]),
            "gpu_memory_utilization": float(named["gpu_memory_utilization"]),
            "use_gradient_checkpointing": _checkpointing(named["use_gradient_checkpointing"]),
        },
        engine=extra if fast else {},
        model=of_model,
        without_effect=() if fast else tuple(sorted(extra)),
    )
    check_combination(made)
    check_packages(made)
    return made


def check_values(named: Mapping[str, Any]) -> None:
    """Raise ConflictingArguments for a value that is out of range on its own."""
    name = named["model_name"]
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ConflictingArguments(
            f"model_name={name!r}: expected a directory or the id of a model on the hub, found {type(name).__name__}"
        )
    counts = ("max_seq_length", "max_lora_rank", *(["num_engines"] if named["num_engines"] is not None else []))
    for key in counts:
        value = named[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConflictingArguments(f"{key}={value!r}: expected a whole number of at least 1")
    share = named["gpu_memory_utilization"]
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConflictingArguments(
            f"gpu_memory_utilization={share!r}: expected a number above 0 and up to 1, the share of the device's "
            "whole memory that vLLM may use: weights, activations and KV cache together"
        )
    for key in SWITCHES:
        if not isinstance(named[key], bool):
            raise ConflictingArguments(f"{key}={named[key]!r}: expected True or False")
    for key in ("enable_sleep_mode", "share_weights"):
        if named[key] not in (None, True, False):
            raise ConflictingArguments(f"{key}={named[key]!r}: expected True, False, or None to leave the choice here")
    if named["lora_layers"] not in get_args(LoraLayers):
        words = ", ".join(map(repr, get_args(LoraLayers)))
        raise ConflictingArguments(f"lora_layers={named['lora_layers']!r}: expected one of {words}")
    check_gradient_checkpointing(named["use_gradient_checkpointing"])


def check_gradient_checkpointing(value: object) -> None:
    """Raise unless `value` is True, False, "auto" or "unsloth", which scripts written for Unsloth say (True)."""
    if not isinstance(value, bool) and value not in ("auto", "unsloth"):
        raise ConflictingArguments(
            f"use_gradient_checkpointing={value!r}: expected True, False, 'auto' (as many layers as memory "
            "needs), or 'unsloth', which means True here"
        )


def _checkpointing(value: bool | str) -> bool | str:
    return value if value == "auto" else bool(value)


def check_combination(config: LoadConfig) -> None:
    """Raise ConflictingArguments or Fp8NeedsEngine for values that exclude each other."""
    if config.load_in_fp8 and config.load_in_4bit:
        raise ConflictingArguments(
            "load_in_fp8=True and load_in_4bit=True (the default): the weights can have one of the two; set "
            "load_in_4bit=False"
        )
    if config.load_in_8bit and (config.load_in_4bit or config.load_in_fp8):
        flag = "load_in_4bit" if config.load_in_4bit else "load_in_fp8"
        default = " (the default)" if config.load_in_4bit else ""
        raise ConflictingArguments(
            f"load_in_8bit=True and {flag}=True{default}: the weights can have one of the two; set {flag}=False"
        )
    if config.load_in_fp8 and not config.fast_inference:
        raise Fp8NeedsEngine(
            "trlpatch: load_in_fp8=True quantizes the weights of the vLLM engine, and fast_inference=False builds "
            "none; set fast_inference=True, or load_in_fp8=False"
        )
    if config.engine.get("quantization") is not None and (config.load_in_4bit or config.load_in_fp8):
        flag = "load_in_4bit" if config.load_in_4bit else "load_in_fp8"
        raise ConflictingArguments(
            f"quantization={config.engine['quantization']!r} and {flag}=True both say how the engine's weights are "
            f"quantized; set {flag}=False"
        )
    _check_quantized_once(config)
    if config.num_engines is not None and not config.fast_inference:
        raise ConflictingArguments(
            f"num_engines={config.num_engines} and fast_inference=False: the engines are vLLM's; leave one of them out"
        )
    if config.resize_model_vocab is not None and config.fast_inference:
        raise ConflictingArguments(
            f"resize_model_vocab={config.resize_model_vocab}: the engine has the checkpoint's vocabulary. Resize the "
            "embeddings with transformers, save model and tokenizer, and load that directory; or set "
            "fast_inference=False"
        )
    if config.share_weights:
        reason = config.why_separate or (None if config.fast_inference else "fast_inference=False builds no engine")
        if reason is not None:
            raise ConflictingArguments(
                f"share_weights=True, but {reason}; leave share_weights out, or load with fast_inference=True, "
                "load_in_4bit=False and load_in_fp8=False"
            )


def _check_quantized_once(config: LoadConfig) -> None:
    if config.model.get("quantization_config") is not None and (config.load_in_4bit or config.load_in_8bit):
        flag = "load_in_4bit=True (the default)" if config.load_in_4bit else "load_in_8bit=True"
        raise ConflictingArguments(
            f"quantization_config=... and {flag} both say how the weights are quantized; set "
            f"load_in_{'4' if config.load_in_4bit else '8'}bit=False"
        )
    quantized = {"quantization": config.engine, "quantization_config": config.model}
    for name, arguments in quantized.items():
        if config.full_finetuning and arguments.get(name) is not None:
            raise ConflictingArguments(
                f"full_finetuning=True and {name}={arguments[name]!r}: every weight is trained and pushed to the "
                f"engine, and quantized ones cannot be; leave {name} out"
            )


def check_packages(config: LoadConfig) -> None:
    """Raise MissingPackage for a package that the configuration needs; none is imported."""
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(
                f"trlpatch: FastLanguageModel needs {name}, which is not installed. Run: pip install {name}"
            )
    if config.fast_inference and importlib.util.find_spec("vllm") is None:
        raise MissingPackage(
            f"{vllm_missing('trlpatch: fast_inference=True builds a vLLM engine')}, or set fast_inference=False to "
            "generate with transformers"
        )
    if config.num_engines is not None and importlib.util.find_spec("ray") is None:
        raise MissingPackage(
            f"trlpatch: num_engines={config.num_engines} puts engines on Ray actors, and Ray is not installed. Run: "
            f"{pip_install('ray')}, or leave num_engines out for one engine in this process"
        )
    if (config.load_in_4bit or config.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        flag, default = ("load_in_4bit", " (the default)") if config.load_in_4bit else ("load_in_8bit", "")
        raise MissingPackage(
            f"trlpatch: {flag}=True{default} needs bitsandbytes, which is not installed. Run: "
            f"{pip_install('4bit')}, or set {flag}=False to load the weights in 16 bits"
        )


def _refuse_unknown(extra: Mapping[str, Any], of_engine: frozenset[str]) -> None:
    for name in extra:
        if name in INSTEAD:
            raise UnknownArgument(f"FastLanguageModel.from_pretrained: use {INSTEAD[name]}= instead of {name}=")
        if name not in of_engine:
            known = OWN | OF_THE_MODEL | of_engine | NEUTRAL.keys() | FOLLOWED
            raise UnknownArgument(
                f"FastLanguageModel.from_pretrained: {name}= is not an argument of it, of {_engine_in_words()}, or of "
                f"transformers' from_pretrained{nearest(name, known)}"
            )


def nearest(name: str, known: frozenset[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """`; did you mean x=?`, or nothing when no known name is like it.

    `elsewhere` has, by what others call them, known names that are spelled too differently to be found.
    """
    meant = (elsewhere or {}).get(name.lower())
    found = [meant] if meant else difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {found[0]}=?" if found else ""


def _engine_in_words() -> str:
    version = installed_version("vllm")
    return f"the installed vLLM's engine ({version})" if version else "vLLM's engine (vLLM is not installed)"
