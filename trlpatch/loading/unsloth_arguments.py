"""Arguments of Unsloth's `from_pretrained`: accepted where they ask for nothing, followed, or refused with the reason.

docs/coming-from-unsloth.md lists them all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from trlpatch.errors import ConflictingArguments
from trlpatch.log import logger
from trlpatch.options import active

CALL = "FastLanguageModel.from_pretrained"


@dataclass(frozen=True)
class Neutral:
    """An argument that is followed by doing nothing.

    Attributes:
        values: what asks for nothing here, or for what is done anyway; compared with their types.
        otherwise: why any other value cannot be followed, and what to do instead.
        dispensable: True changes no result, only what it takes: compat="on" goes on without it, with a warning.
    """

    values: tuple[object, ...]
    otherwise: str
    dispensable: bool = False

    def asks_nothing(self, value: object) -> bool:
        """Is it followed by doing nothing?"""
        return any(type(value) is type(one) and value == one for one in self.values)

    def check(self, call: str, name: str, value: object) -> None:
        """Raise ConflictingArguments for a value that asks for something."""
        if self.asks_nothing(value):
            return
        message = f"{call}: {name}={value!r} is not supported: {self.otherwise}"
        if self.dispensable and value is True:
            if active().compat == "on":
                logger.warning('%s. Loaded without it, as compat="on" asks', message)
                return
            message += '. PatchFastRL(compat="on"), called before, loads without it'
        raise ConflictingArguments(message)


_EITHER = (True, False, None)
_BOOL = "expected True or False"
_AUDIO = "models that read sound are not loaded; leave it out"

NEUTRAL = {
    "device_map_planner_kwargs": Neutral((None, {}), "device maps are not planned here; give device_map= itself"),
    "fix_tokenizer": Neutral(_EITHER, f"{_BOOL}; the tokenizer is the checkpoint's in either case"),
    "float32_mixed_precision": Neutral(
        (False, None),
        "set dtype=torch.float32 with fast_inference=False, or leave mixed precision to the trainer (bf16=True)",
    ),
    "fullgraph": Neutral(_EITHER, f"{_BOOL}; the model is not compiled in either case"),
    "num_labels": Neutral((None,), "only causal language models are loaded; leave it out"),
    "offload_embedding": Neutral(
        (False, None),
        "trainers move the whole model to its device again, and a vLLM engine keeps its embeddings there; leave it "
        "out. Memory is saved by load_in_4bit=True, by use_gradient_checkpointing and by a lower "
        "gpu_memory_utilization",
        dispensable=True,
    ),
    "qat_scheme": Neutral((None,), "weights are not trained for quantization here; leave it out"),
    "return_logits": Neutral(_EITHER, f"{_BOOL}; transformers returns logits in either case"),
    "rope_scaling": Neutral(
        (None, {}),
        "engine and trainer both read it from the checkpoint; write it into its config.json (rope_scaling; "
        "rope_parameters for transformers 5) and load that directory",
    ),
    "target_parameters": Neutral((None,), "it belongs to the adapter; give it to FastLanguageModel.get_peft_model"),
    "text_only": Neutral(
        _EITHER, f"{_BOOL}; FastLanguageModel loads for text alone, FastModel what the checkpoint reads"
    ),
    "unsloth_force_compile": Neutral((False, None), "the model is not compiled; leave it out"),
    "unsloth_tiled_mlp": Neutral(
        (False, None), "the MLP is not computed in tiles; leave it out. use_gradient_checkpointing saves more memory"
    ),
    "use_exact_model_name": Neutral(_EITHER, f"{_BOOL}; no name is replaced by another one's in either case"),
    "whisper_language": Neutral((None,), _AUDIO),
    "whisper_task": Neutral((None,), _AUDIO),
}
"""Arguments that have no effect of their own, in alphabetical order."""

FOLLOWED = frozenset(
    {
        "auto_model",
        "random_state",
        "resize_model_vocab",
        "tokenizer_name",
        "torch_dtype",
        "unsloth_vllm_standby",
    }
)
"""Those that have an effect."""

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps of accelerate that put a model on one device where that has room for it."""


def take_unsloth_arguments(named: dict[str, Any], extra: dict[str, Any], given: Collection[str]) -> None:
    """Move Unsloth's names from `extra` to what they mean here.

    Args:
        named: trlpatch's own parameters; changed in place.
        extra: what else the caller gave; Unsloth's names are taken out.
        given: the parameters that the caller gave, where the others are at their defaults.

    Raises:
        ConflictingArguments: a value that cannot be followed, or two names of one setting that differ.
    """
    for name in NEUTRAL.keys() & extra.keys():
        NEUTRAL[name].check(CALL, name, extra.pop(name))
    _take_auto_model(extra, images=bool(named.get("images")))
    named["resize_model_vocab"] = _whole(extra.pop("resize_model_vocab", None), "resize_model_vocab", least=1)
    named["tokenizer_name"] = extra.pop("tokenizer_name", None)
    _take_alias(named, extra, "torch_dtype", "dtype", _dtype_name)
    _take_alias(named, extra, "unsloth_vllm_standby", "enable_sleep_mode", repr)
    named["random_state"] = seed = _whole(extra.pop("random_state", None), "random_state", least=0)
    if seed is not None and extra.get("seed", seed) != seed:
        raise ConflictingArguments(
            f"{CALL}: random_state={seed} and seed={extra['seed']!r} both seed the engine; leave one of them out"
        )
    _give_way(named, given)


def without_spread(device_map: object, *, engine: bool) -> bool:
    """Does `device_map` ask for nothing? None does, and beside an engine, whose device decides, accelerate's words."""
    return device_map is None or (engine and device_map in _SPREAD)


def _take_auto_model(extra: dict[str, Any], *, images: bool) -> None:
    wanted = extra.pop("auto_model", None)
    classes = ("AutoModelForCausalLM", *(("AutoModelForImageTextToText", "AutoModelForVision2Seq") if images else ()))
    if wanted is not None and getattr(wanted, "__name__", None) not in classes:
        raise ConflictingArguments(
            f"{CALL}: auto_model={getattr(wanted, '__name__', wanted)!s}: only {' and '.join(classes)} are "
            "loaded, and the checkpoint decides; leave it out"
        )


def _take_alias(named: dict[str, Any], extra: dict[str, Any], alias: str, name: str, spelled: Any) -> None:
    """Take `alias` for `name`; both are fine where they say the same."""
    if alias not in extra:
        return
    value = extra.pop(alias)
    if value is None:
        return
    if named[name] is not None and spelled(named[name]) != spelled(value):
        raise ConflictingArguments(
            f"{CALL}: {alias}={value!r} and {name}={named[name]!r} are two names of one setting; leave one of them out"
        )
    named[name] = value


def _dtype_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _whole(value: object, name: str, *, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConflictingArguments(f"{CALL}: {name}={value!r}: expected a whole number of at least {least}, or None")
    return value


def _give_way(named: dict[str, Any], given: Collection[str]) -> None:
    """Switch the default load_in_4bit=True off where another argument asks for whole weights in as many words."""
    for name in ("full_finetuning", "load_in_16bit"):
        if named[name] is not True:
            continue
        if "load_in_4bit" not in given:
            named["load_in_4bit"] = False
        for other in ("load_in_4bit", "load_in_8bit", "load_in_fp8"):
            if named[other] is True:
                raise ConflictingArguments(f"{CALL}: {name}=True and {other}=True: {_WHY[name]}; set {other}=False")


_WHY = {
    "full_finetuning": "every weight is trained, and quantized ones cannot be",
    "load_in_16bit": "the weights can have one of the two",
}
