"""Require one model on both sides: the vocabulary and the log-probabilities of an engine and of a trainer's model.

An adapter is the policy on top of the base that it is trained on. What loading both from one call proves is proved
here for two that somebody has put together: another checkpoint or revision, embeddings that were resized or made anew,
an earlier adapter merged into the trainer's model, a head that one side ties and the other does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trlpatch.engine import probes
from trlpatch.engine.drain import unfinished
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.sharing.logits import check_prompts, compare_logprobs, model_logprobs
from trlpatch.engine.state import EngineState
from trlpatch.errors import EngineBusy, EngineMismatch
from trlpatch.log import logger
from trlpatch.policy import lora_support
from trlpatch.policy.adapter import lora_view
from trlpatch.policy.sharding import filled_later, sharded_by

if TYPE_CHECKING:
    from torch.nn import Module

_LEAVE_OUT = "attach_engine(model, llm, check=False) leaves the comparison out"


def require_same_model(base: Module, llm: RolloutEngine, state: EngineState) -> bool:
    """Compare vocabularies, and log-probabilities of a few tokens without adapters; the engine is awake.

    True when they were. Costs one forward pass of each and leaves nothing in the engine. Log-probabilities are not
    compared where the engine's weights are not the base model's on purpose (TRL has pushed others) or where the model
    cannot be run alone (sharded, an adapter merged): its weights are compared at the first rollout then.

    Raises:
        EngineMismatch: they are not the same model. Of a quantized engine or model only the vocabulary counts, what
            rounding may explain is a warning.
        EngineBusy: the engine has unfinished requests, which a comparison would finish.
    """
    vocabulary = probes.vocabulary_size(llm)
    if vocabulary is None:
        return False
    _require_vocabulary(base, vocabulary)
    reason = _why_not_compared(base, state)
    if reason is not None:
        logger.info("log-probabilities of engine and %s are not compared: %s", type(base).__name__, reason)
        return False
    model: Any = base
    prompts = check_prompts(model, llm)
    try:
        logprobs = [model_logprobs(model, ids) for ids in prompts]
    except Exception as error:
        logger.warning(
            "attach_engine: the log-probabilities of engine and %s could not be compared, because the model's own "
            "forward pass of %d tokens failed: %r",
            type(base).__name__,
            len(prompts[0]),
            error,
        )
        return False
    with state.occupancy.handing_over(llm.llm_engine, "attach_engine", wait=True), state.as_asked():
        if unfinished(llm):
            raise EngineBusy(
                "attach_engine(model, llm): the engine has unfinished requests, which comparing it with the model "
                "would finish; let them finish, or abort them with llm.llm_engine.abort_request(...); "
                f"{_LEAVE_OUT}"
            )
        try:
            compare_logprobs(model, llm, prompts, logprobs)
        except EngineMismatch as mismatch:
            rounded = probes.quantization(llm) or _quantization(base)
            if rounded is None:
                raise EngineMismatch(
                    f"attach_engine(model, llm): {mismatch}, and that the model is as it was loaded (embeddings not "
                    "resized, no adapter merged, the head tied as in the checkpoint); "
                    f"{_LEAVE_OUT}"
                ) from None
            logger.warning("quantization shows (%s): %s", rounded, mismatch)
    return True


def _require_vocabulary(base: Module, vocabulary: int) -> None:
    own = vocabulary_of(base)
    if own not in (None, vocabulary):
        raise EngineMismatch(
            f"attach_engine(model, llm): {type(base).__name__} has a vocabulary of {own} tokens, the engine of "
            f"{vocabulary}: one would be asked for tokens that it does not have; expected the same checkpoint. After "
            "resize_token_embeddings, save the model with its tokenizer and build the engine of that directory"
        )


def vocabulary_of(base: Module) -> int | None:
    """The tokens that a transformers model has embeddings for, as its configuration says."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = getattr(text, "vocab_size", None)
    return None if own is None else int(own)


def _why_not_compared(base: Module, state: EngineState) -> str | None:
    if state.policy_location in ("policy", "weights") or state.weights_lost or state.torn:
        return "the engine's weights are those that a trainer pushes"
    if filled_later() or any(_elsewhere(parameter) for parameter in base.parameters()):
        return "the model's weights are sharded, offloaded or not loaded yet"
    view = lora_view(base)
    if view is not None and view.merged:
        return "an adapter is merged into the model's weights at present"
    reason = None if view is None else lora_support.unsupported_reason(view)
    return None if reason is None else f"TRL pushes every weight, since vLLM cannot serve the adapter: {reason}"


def _elsewhere(parameter: Any) -> bool:
    return bool(parameter.is_meta or sharded_by(parameter) is not None)


def _quantization(base: Module) -> str | None:
    if not getattr(base, "is_quantized", False):
        return None
    return f"the trainer's {getattr(base, 'quantization_method', 'model')}"
