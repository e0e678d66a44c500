"""Check sampling settings when a trainer is built: those with which it would train on, and learn nothing or little.

They come from three places, and the later wins: TRL's own fields (`top_p`, `min_p`, ...), `generation_kwargs`,
`vllm_sampling_params`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.hooks.protocols import TrainerArguments, TrainerLike
from trlpatch.hooks.sampling import FIELD, ONE_SEED, end_tokens, masks_at_eos, unseen_stops
from trlpatch.log import tell_translation, warn_once
from trlpatch.options import active
from trlpatch.trl_names import CORRECTION, CORRECTION_LEFT_OUT

_KWARGS = "generation_kwargs"

# What changes the distribution that tokens are drawn from, temperature apart, and the values that do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "structured_outputs": ({},),
    "guided_decoding": ({},),
    "thinking_token_budget": (),
    "vllm_structured_outputs_regex": (),
    "vllm_guided_decoding_regex": (),
}

_GREEDY_TEMPERATURE = 1e-5  # vLLM takes the likeliest token below it


@dataclass(frozen=True)
class _Setting:
    """A sampling parameter in force, and the field of the config that it comes from."""

    value: Any
    place: str

    def told(self, name: str) -> str:
        text = repr(self.value)
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        return f"{name}={shown}" + ("" if self.place == name else f" ({self.place})")


def check_sampling(trainer: TrainerLike, args: TrainerArguments, engine: RolloutEngine | None, model: object) -> None:
    """Warn, once each, of sampling settings that quietly keep a colocated trainer from learning.

    `engine` is the attached one; None where TRL builds its own, whose log-probabilities are processed ones.
    """
    settings = _settings(args)
    _check_temperature(trainer, args, settings)
    _check_equal_completions(trainer, args, settings)
    _check_correction(trainer, args, engine, settings)
    _check_ends(trainer, args, engine, model)


def _settings(args: TrainerArguments) -> dict[str, _Setting]:
    found = {name: _Setting(getattr(args, name), name) for name in ("temperature", *_NEUTRAL) if hasattr(args, name)}
    for place in (_KWARGS, FIELD):
        given = getattr(args, place, None)
        if isinstance(given, Mapping):
            found |= {str(name): _Setting(value, place) for name, value in given.items()}
    return found


def _check_temperature(trainer: TrainerLike, args: TrainerArguments, settings: Mapping[str, _Setting]) -> None:
    own, asked = getattr(args, "temperature", None), settings.get("temperature")
    if own is None or asked is None or asked.value in (None, own):
        return
    warn_once(
        trainer,
        f"rollouts are sampled at temperature {asked.value} ({asked.place}), but the trainer computes its "
        f"log-probabilities at args.temperature={own}: set both to the same value",
    )


def _check_equal_completions(trainer: TrainerLike, args: TrainerArguments, settings: Mapping[str, _Setting]) -> None:
    pair = type(args).__name__.startswith("OnlineDPO")
    if not pair and getattr(args, "num_generations", 1) < 2:
        return
    name = type(trainer).__name__
    seed = settings.get("seed")
    # OnlineDPO asks for n=2, and vLLM seeds the second of one request with seed + 1.
    if seed is not None and seed.value is not None and seed.place == _KWARGS and not pair:
        warn_once(trainer, f"{name}: {_KWARGS} sets seed={seed.value!r}: {ONE_SEED}")
    for greedy in _greedy(settings):
        warn_once(
            trainer,
            f"{name}: {greedy} leaves one token to sample, the likeliest: all completions of a prompt are the same "
            "one, every advantage is zero, and nothing is learned. Leave it out",
        )


def _greedy(settings: Mapping[str, _Setting]) -> Iterator[str]:
    for name, one in settings.items():
        value = one.value
        if (
            (name == "temperature" and isinstance(value, (int, float)) and value < _GREEDY_TEMPERATURE)
            or (name == "top_k" and value == 1)
            or (name == "min_p" and value == 1)
            or (name == "allowed_token_ids" and isinstance(value, list) and len(value) == 1)
        ):
            yield one.told(name)


def _check_correction(
    trainer: TrainerLike, args: TrainerArguments, engine: RolloutEngine | None, settings: Mapping[str, _Setting]
) -> None:
    if not getattr(args, CORRECTION, False):
        return
    mode = "processed_logprobs" if engine is None else probes.logprobs_mode(engine) or "raw_logprobs"
    processed, warm = mode == "processed_logprobs", settings.get("temperature", _Setting(1.0, "")).value != 1.0
    cut = [
        one.told(name)
        for name, one in settings.items()
        if name in _NEUTRAL and one.value is not None and one.value not in _NEUTRAL[name]
    ]
    if not cut:
        if warm and not processed:
            warn_once(
                trainer,
                f"the attached engine reports {mode}, but TRL corrects with the log-probabilities that tokens were "
                "sampled with, and the temperature changes those: the correction is biased. Build the engine with "
                'logprobs_mode="processed_logprobs"',
            )
        return
    if not processed and not warm:
        return  # both sides are log-probabilities of the full softmax
    level = getattr(args, "vllm_importance_sampling_mode", "token_truncate")
    if processed:
        why = (
            "the trainer's log-probabilities are of all tokens, the engine's (processed_logprobs) of what sampling "
            "leaves of them"
        )
    else:
        why = f"the trainer's log-probabilities are at temperature {settings['temperature'].value}, the engine's "
        why += f"({mode}) at 1"
    ways = ["set vllm_importance_sampling_correction=False"]
    if engine is not None and not warm:
        ways.append('build the engine with logprobs_mode="raw_logprobs" (right while temperature is 1)')
    ways.append(f"leave {'it' if len(cut) == 1 else 'them'} out")
    if engine is not None and not processed:
        ways[-1] += ' and build the engine with logprobs_mode="processed_logprobs"'
    told = (
        f"{type(trainer).__name__}: with {', '.join(cut)} TRL's importance sampling correction "
        f"(vllm_importance_sampling_mode={level!r}) weights completions by a ratio that is not near 1: {why}. "
        "Gradients shrink with it, over long completions to nothing."
    )
    # Batches that are generated ahead have nothing else that corrects them (`trlpatch.ray.prefetch`).
    if active().compat == "on" and CORRECTION_LEFT_OUT in vars(args) and not getattr(engine, "prefetch", 0):
        setattr(args, CORRECTION, False)
        tell_translation(f"{told} {CORRECTION}=False is set, as Unsloth has it; a value that you write is left alone")
        return
    warn_once(trainer, f"{told} Either {', or '.join(ways)}")


def _check_ends(trainer: TrainerLike, args: TrainerArguments, engine: RolloutEngine | None, model: object) -> None:
    """Warn of completions that end properly and that this TRL takes for truncated, or for longer than they are."""
    if not hasattr(args, "mask_truncated_completions"):
        return
    name, words = type(trainer).__name__, _tokenizer(engine)
    behind = "trains on the padding behind them; use TRL 0.24 or newer"
    masked = "masks them, mask_truncated_completions=True: nothing is learned from them. Set it to False"
    known = end_tokens(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    own = getattr(words, "eos_token_id", None)
    others = [token for token in known if token != own]
    if len({*known, *end_tokens(own)}) > 1 and not _knows_all_ends(type(trainer)):
        ends = f"{name}: the model's generation_config has eos_token_id={known}, and this TRL takes the tokenizer's "
        ends += "EOS alone for the end of a completion (below 1.14.2). Those that end otherwise"
        ends += f" ({', '.join(map(str, others))}) it" if own is not None else " it"
        if masks_at_eos(trainer):
            warn_once(trainer, f"{ends} does not see the end of, and {behind}")
        elif args.mask_truncated_completions:
            warn_once(trainer, f"{ends} takes for truncated and {masked}, or use TRL 1.14.2 or newer")
    if masks_at_eos(trainer) or not args.mask_truncated_completions:
        return  # below 0.24 the hook `sampling_params` looks at stops
    for place in (_KWARGS, FIELD):
        given = getattr(args, place, None)
        given = given if isinstance(given, Mapping) else {}
        for stop in unseen_stops(words, given, known):
            warn_once(
                trainer,
                f"{name}: {place} sets {stop}={given[stop]!r}: TRL takes a completion that does not end at EOS for "
                f"truncated, also one that ends at such a stop, and {masked}, or leave the stop out",
            )


def _tokenizer(engine: RolloutEngine | None) -> Any:
    get_tokenizer = getattr(engine, "get_tokenizer", None)
    return get_tokenizer() if callable(get_tokenizer) else None


def _knows_all_ends(trainer: type) -> bool:
    # GRPO and RLOO take generation_config's ids as well since 1.14.2, and keep them under this name.
    inits = (vars(cls)["__init__"] for cls in trainer.__mro__ if "__init__" in vars(cls))
    code = (getattr(inspect.unwrap(one), "__code__", None) for one in inits)
    return any("eos_token_ids" in one.co_names for one in code if one is not None)
