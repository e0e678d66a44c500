"""Chat template hook, the `chat_template=` of every `llm.chat`: the trainer's, whatever the engine's tokenizer has."""

from __future__ import annotations

from trlpatch.hooks.protocols import Owner


def chat_template(owner: Owner, given: str | None = None) -> str | None:
    """Return the template of the trainer's tokenizer or processor, or `given` where TRL has one of its own.

    vLLM renders with the tokenizer that it loaded from the checkpoint, and sees no template that was set after
    loading. None, vLLM's own choice, where the trainer's has none or several by name.
    """
    if given is not None:
        return given
    own = getattr(getattr(owner, "processing_class", None), "chat_template", None)
    return own if isinstance(own, str) else None
