"""Sampling hooks, the config field `vllm_sampling_params`: values given there win over TRL's, on every release."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from trlpatch.engine.sampling_params import GIVEN, explicit_values
from trlpatch.errors import ProtectedSamplingParam, UnusableSamplingParam
from trlpatch.hooks.prompt_length import with_limit
from trlpatch.hooks.protocols import GenerationLike, TrainerArguments
from trlpatch.hooks.trainers import args_of, binding
from trlpatch.log import log_once, tell_translation, warn_once
from trlpatch.options import active

T = TypeVar("T")

FIELD = "vllm_sampling_params"

# TRL below 0.24 takes a completion to end at its first EOS, and at the last column of the batch where it has none.
_MASKED_AT_EOS = ("GRPOTrainer", "RLOOTrainer")
_STOPS = ("stop", "stop_token_ids")

# TRL's code relies on these values being its own.
_PROTECTED: dict[str, str] = {
    "n": "TRL lays prompts out for its own number of completions",
    "logprobs": "TRL indexes the log-probabilities for importance sampling",
    "prompt_logprobs": "TRL never reads them and vLLM would compute them for every prompt",
    "detokenize": "TRL decides whether text is needed",
    "truncate_prompt_tokens": "the trainer would score another prompt than the engine saw",
    "output_kind": "TRL reads whole completions",
}
_MAX_TOKENS = ("max_tokens", "this trainer pads to TRL's own value; set its config field instead")
# OnlineDPO reads `generation_config.max_tokens` back for padding, GOLD cuts its teacher's inputs by it.
_OWN_MAX_TOKENS = ("OnlineDPO", "GOLD", "NashMD", "XPO")

# TRL sends each prompt num_generations times, and vLLM seeds a generator per request.
ONE_SEED = (
    "vLLM would seed every request with it, all completions of a prompt would be the same one, every advantage zero, "
    "and nothing would be learned. Leave it out; for repeatable runs seed the engine, once for all requests: "
    "LLM(seed=...) (FastLanguageModel's has seed 0)"
)

# vLLM has no None for these: None leaves TRL's own value.
_NOT_NONE = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "min_tokens", "ignore_eos"}
    | {"repetition_penalty", "presence_penalty", "frequency_penalty"}
)
_NOTHING = ("", "null", "none")

_STRUCTURED = {"structured_outputs": "StructuredOutputsParams", "guided_decoding": "GuidedDecodingParams"}


def normalize_sampling(config: object) -> None:
    """Make `vllm_sampling_params` a plain dict of the given values, at the head of a config's `__post_init__`.

    Takes a vLLMSamplingParams, a SamplingParams (values that differ from vLLM's defaults), a mapping or a
    JSON object as text. The result is JSON-able, so that configs can be pickled and logged. Idempotent. "null", "none"
    and "" are None, as a command line has no other way to say it; so is a value of None that vLLM would not take.

    Raises:
        ProtectedSamplingParam: a value is TRL's own.
        UnusableSamplingParam: the field is of another type, or a value is not JSON-able.
    """
    given = getattr(config, FIELD, None)
    if isinstance(given, str) and given.strip().lower() in _NOTHING:
        given = None
        setattr(config, FIELD, None)
    if given is None:
        return
    setattr(config, FIELD, _checked(config, _plain(config, given)))


def _plain(config: object, given: object) -> dict[str, Any]:
    where = f"{type(config).__name__}.{FIELD}"
    if isinstance(given, str):  # the command line
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UnusableSamplingParam(f"{where}: expected a JSON object, found {given!r} ({error})") from error
    if isinstance(given, Mapping):
        values = dict(given)
    else:
        found = explicit_values(given)
        if found is None:
            raise UnusableSamplingParam(
                f"{where}: expected vLLMSamplingParams, vllm.SamplingParams or a dict, found {type(given).__name__}"
            )
        if not hasattr(given, GIVEN):
            log_once(
                given,
                f"{where}: a plain SamplingParams does not say which values you gave; those that differ from vLLM's "
                f"defaults are used ({', '.join(sorted(found)) or 'none'}). trlpatch.vLLMSamplingParams remembers "
                "them",
                level=logging.WARNING,
            )
        values = found
    values = {
        str(name): _jsonable(value) for name, value in values.items() if value is not None or name not in _NOT_NONE
    }
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        raise UnusableSamplingParam(
            f"{where}: a value is not JSON-able ({error}); TRL logs and stores its arguments as JSON"
        ) from error
    return values


def _jsonable(value: object) -> object:
    """Dataclasses (StructuredOutputsParams, GuidedDecodingParams) become dicts of what was set in them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.init and not field.name.startswith("_") and getattr(value, field.name) != field.default
        }
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    return value


def _checked(config: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what is TRL's own; of one seed for all requests compat="on" says that it is left out."""
    config_name, protected = type(config).__name__, dict(_PROTECTED)
    if config_name.startswith(_OWN_MAX_TOKENS):
        protected[_MAX_TOKENS[0]] = _MAX_TOKENS[1]
    for name in values:
        if name in protected:
            raise ProtectedSamplingParam(
                f"{config_name}.{FIELD} sets {name!r}, which belongs to TRL: {protected[name]}. Leave it out"
            )
    if values.get("seed") is None:
        return dict(values)
    where = f"{config_name}.{FIELD} sets seed={values['seed']!r}"
    if active().compat != "on":
        raise ProtectedSamplingParam(f'{where}: {ONE_SEED}. PatchFastRL(compat="on") leaves it out for you')
    tell_translation(f'{where}, which compat="on" leaves out: {ONE_SEED}')
    return {name: value for name, value in values.items() if name != "seed"}


def sampling_params(owner: object, build: Callable[..., T]) -> Callable[..., T]:
    """What stands where TRL wrote `SamplingParams`: TRL's keyword arguments with the user's values on top.

    `owner` is a trainer, a VLLMGeneration or a config. Without `vllm_sampling_params` it is `build` itself.

    Raises:
        ProtectedSamplingParam: a value is TRL's own, or completions would end at something that this TRL does not see
            as their end.
        UnusableSamplingParam: a value is not JSON-able.
    """
    args, build = args_of(owner), with_limit(build)
    given = getattr(args, FIELD, None)
    if masks_at_eos(owner):
        _warn_of_stops(owner, getattr(args, "generation_kwargs", None) or {})
    if not given:
        return build
    values = given if isinstance(given, dict) else _plain(args, given)
    values = _checked(args, values)
    if masks_at_eos(owner):
        _refuse_stops(owner, type(args).__name__, values)

    def merged(*positional: object, **named: object) -> T:
        return build(*positional, **{**named, **{name: _rebuilt(name, value) for name, value in values.items()}})

    return merged


def generation(args: TrainerArguments, build: Callable[..., GenerationLike]) -> Callable[..., GenerationLike]:
    """What stands where TRL wrote `VLLMGeneration`: the object it makes knows the trainer's arguments."""
    return binding(args, build)


def masks_at_eos(owner: object) -> bool:
    """Is `owner` a GRPO or RLOO trainer of TRL below 0.24, which ends a completion at its first EOS?"""
    # 0.24 split generation off into this method, and takes completions as long as they were sampled since.
    names = {cls.__name__ for cls in type(owner).__mro__}
    return bool(names.intersection(_MASKED_AT_EOS)) and not hasattr(owner, "_generate_single_turn")


def end_tokens(given: int | Sequence[int] | None) -> list[int]:
    """Return an `eos_token_id` as a list; transformers has None, an int or a list in tokenizers and configs."""
    if given is None:
        return []
    return [given] if isinstance(given, int) else list(given)


def unseen_stops(words: object, values: Mapping[str, object], ends: Collection[int] = ()) -> list[str]:
    """Return the names under which `values` end completions at something else than EOS.

    A stop string whose last token is an EOS ends nothing that EOS does not end. `words` is the tokenizer, or a
    processor that has one, or None; `ends` are further ids that end a completion.
    """
    words = getattr(words, "tokenizer", words)
    known = {*end_tokens(getattr(words, "eos_token_id", None)), *ends}

    def is_end(name: str, stop: object) -> bool:
        if name == "stop_token_ids":
            return stop in known
        return stop == getattr(words, "eos_token", None) or _last_token(words, stop) in known

    return [name for name in _STOPS if not all(is_end(name, stop) for stop in _listed(values.get(name)))]


def _last_token(words: object, text: object) -> int | None:
    encode = getattr(words, "encode", None)
    ids: list[int] = encode(text, add_special_tokens=False) if callable(encode) and isinstance(text, str) else []
    return ids[-1] if ids else None


def _listed(stops: object) -> list[object]:
    if not stops:
        return []
    return [stops] if isinstance(stops, (str, int)) else list(cast("Iterable[object]", stops))


def _known_ends(owner: object) -> list[int]:
    # vLLM ends completions at every eos_token_id of the generation_config, whatever stops are asked for.
    # `sampling_checks` tells where this TRL does not see one of them.
    generation_config = getattr(getattr(owner, "model", None), "generation_config", None)
    return end_tokens(getattr(generation_config, "eos_token_id", None))


def _refuse_stops(owner: object, config_name: str, values: Mapping[str, object]) -> None:
    for name in unseen_stops(getattr(owner, "processing_class", None), values, _known_ends(owner)):
        raise ProtectedSamplingParam(
            f"{config_name}.{FIELD} sets {name}={values[name]!r}: TRL below 0.24 ends a completion at EOS only, and "
            "would train on the padding behind such a stop. Leave it out, or use TRL 0.24 or newer"
        )


def _warn_of_stops(owner: object, values: Mapping[str, object]) -> None:
    for name in unseen_stops(getattr(owner, "processing_class", None), values, _known_ends(owner)):
        warn_once(
            owner,
            f"generation_kwargs sets {name}={values[name]!r}: TRL below 0.24 ends a completion at EOS only, and "
            "trains on the padding behind such a stop; use TRL 0.24 or newer",
        )


def _rebuilt(name: str, value: object) -> object:
    """vLLM wants its own classes for structured outputs, and numbers as keys of biases; JSON has dicts and text."""
    if name == "logit_bias" and isinstance(value, Mapping):
        return {int(token): bias for token, bias in value.items()}
    if name not in _STRUCTURED or not isinstance(value, Mapping):
        return value
    import vllm.sampling_params

    return getattr(vllm.sampling_params, _STRUCTURED[name])(**value)
