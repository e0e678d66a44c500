"""Image prompt hooks: what an engine is given for a prompt with images, and what it has made of it.

vLLM puts an image's tokens in place of one placeholder. The processor of a trainer has done so already in the ids of
TRL 0.29.1 and newer (https://github.com/huggingface/trl/issues/6294).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from trlpatch.errors import EngineMismatch
from trlpatch.hooks.protocols import Owner
from trlpatch.hooks.trainers import model_of
from trlpatch.policy.adapter import base_of

_IDS, _MEDIA = "prompt_token_ids", "multi_modal_data"

_trained_on: ContextVar[Sequence[Any] | None] = ContextVar("_trained_on", default=None)
"""The prompts of the rollout that is being asked for, as the trainer goes on with them; None without images."""


def image_prompts(owner: Owner, prompts: Sequence[Any]) -> Sequence[Any]:
    """Return the prompts with one placeholder per image; those without images, and without ids, as they are."""
    if not any(map(_with_images, prompts)):
        _trained_on.set(None)
        return prompts
    _trained_on.set(prompts)
    token = _image_token(owner)
    if token is None:
        return prompts
    return [
        {**prompt, _IDS: _collapsed(prompt[_IDS], token)} if _with_images(prompt) else prompt for prompt in prompts
    ]


def same_prompts(owner: Owner, outputs: Sequence[Any]) -> Sequence[Any]:
    """Return the outputs of a rollout, if the engine has read the prompts that `image_prompts` was given for it.

    Raises:
        EngineMismatch: of an image it has made other tokens than the trainer's processor.
    """
    prompts = _trained_on.get()
    if prompts is None:
        return outputs
    _trained_on.set(None)
    for prompt, output in zip(prompts, outputs, strict=False):
        if not _with_images(prompt):
            continue
        ours, read = list(prompt[_IDS]), list(output.prompt_token_ids)
        if ours == read or _one_token_each(owner, prompt):
            continue
        raise EngineMismatch(
            f"a rollout of {type(owner).__name__}: of a prompt with an image the engine has read {len(read)} tokens, "
            f"and the trainer goes on with {len(ours)}: its completions would be trained on as answers to another "
            "prompt. Expected the same settings of the image processor on both sides (pixels: give "
            "mm_processor_kwargs to FastVisionModel.from_pretrained), and a model whose image is a run of one token, "
            "as of Qwen's; TRL 0.29.1 and newer hand over the ids of expanded images "
            "(https://github.com/huggingface/trl/issues/6294), 0.25 to 0.29.0 the messages"
        )
    return outputs


def _with_images(prompt: Any) -> bool:
    return isinstance(prompt, Mapping) and _IDS in prompt and bool((prompt.get(_MEDIA) or {}).get("image"))


def _one_token_each(owner: Owner, prompt: Mapping[str, Any]) -> bool:
    """Are there as many image tokens as images, so that the engine had to make more of them?"""
    images = prompt[_MEDIA]["image"]
    count = len(images) if isinstance(images, (list, tuple)) else 1
    token = _image_token(owner)
    return token is not None and list(prompt[_IDS]).count(token) == count


def _image_token(owner: Owner) -> int | None:
    config = getattr(base_of(model_of(owner)), "config", None)
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def _collapsed(ids: Sequence[int], token: int) -> list[int]:
    return [one for i, one in enumerate(ids) if one != token or i == 0 or ids[i - 1] != token]
