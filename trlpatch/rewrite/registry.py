"""All patches, in the order they are applied."""

from __future__ import annotations

from trlpatch.errors import UnknownPatch
from trlpatch.rewrite.patch import Patch
from trlpatch.rewrite.patches import (
    adapter_sync,
    configure,
    default_kwargs,
    engine_reuse,
    gold_length,
    guided_decoding,
    live_adapter,
    package_checks,
    plain_prompts,
    prompt_limit,
    rollout_func,
    rollout_func_server,
    sampling,
    sampling_config,
    seed_worker,
    sleep,
    tool_engine,
    top_k,
    trainer_parts,
    use_cache,
    vllm_tokenizer,
    warnings_issued,
    weight_sender,
    without_requests,
)

PATCHES: tuple[Patch, ...] = (
    configure.PATCH,
    engine_reuse.PATCH,
    adapter_sync.PATCH,
    live_adapter.PATCH,
    rollout_func.PATCH,
    sleep.PATCH,
    sampling.PATCH,
    sampling_config.PATCH,
    # Repairs, each for combinations of releases that do not work together.
    package_checks.PATCH,
    vllm_tokenizer.PATCH,
    without_requests.PATCH,
    weight_sender.PATCH,
    guided_decoding.PATCH,
    warnings_issued.PATCH,
    use_cache.PATCH,
    seed_worker.PATCH,
    default_kwargs.PATCH,
    plain_prompts.PATCH,
    gold_length.PATCH,
    trainer_parts.PATCH,
    tool_engine.PATCH,
    prompt_limit.PATCH,
    top_k.PATCH,
    rollout_func_server.PATCH,
)
"""Explicit and ordered. `live_adapter` comes before `sleep`, which inserts statements after rollout calls."""


def patches() -> tuple[Patch, ...]:
    """Return every patch in order of application."""
    return PATCHES


def left_out(skip: frozenset[str]) -> dict[str, str]:
    """Return the patches that `skip` leaves out, with reasons, including those that would be wrong without them.

    Raises:
        UnknownPatch: `skip` names a patch that does not exist.
    """
    known = {patch.name for patch in PATCHES}
    if unknown := sorted(skip - known):
        raise UnknownPatch(f"skip={unknown!r} names no patch. Known: {', '.join(sorted(known))}. See: trlpatch list")
    reasons = dict.fromkeys(skip, "left out by skip")
    grown = True
    while grown:
        grown = False
        for patch in PATCHES:
            needed = next((name for name in patch.requires if name in reasons), None)
            if patch.name not in reasons and needed is not None:
                reasons[patch.name] = f"needs {needed}, which is left out"
                grown = True
    return reasons
