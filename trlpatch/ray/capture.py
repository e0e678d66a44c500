"""Capture what `vllm.LLM` would add to its engine: prompts rendered and parameters checked by the release's own code.

`LLM.generate` and `LLM.chat` render, validate, add and then step until everything has ended. An engine that others
step as well must not be stepped there: the additions are noted down instead of made, and the call ends where it would
begin to step. All of it is vLLM's own: chat templates, images, the defaults of `generation_config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Addition:
    """One call of `LLMEngine.add_request`."""

    request_id: str
    prompt: Any
    params: Any
    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    def add_to(self, inner: Any) -> None:
        """Make the call."""
        inner.add_request(self.request_id, self.prompt, self.params, *self.positional, **self.named)


class _Enough(BaseException):
    """All requests would have been added; no `except Exception` of vLLM's may take it for a failure."""


def additions(
    llm: Any, method: str, prompts: Any, sampling_params: Any, arguments: Mapping[str, Any]
) -> list[Addition]:
    """What `llm.<method>(prompts, sampling_params=..., **arguments)` adds to the engine, which is left as it is.

    Nobody else may use the engine meanwhile.

    Raises:
        Whatever vLLM says of the prompts and parameters.
    """
    if isinstance(prompts, Sequence) and not prompts:
        return []
    inner, noted = llm.llm_engine, list[Addition]()

    def add_request(request_id: str, prompt: Any, params: Any, *positional: Any, **named: Any) -> str:
        # From 0.10 to 0.23 `LLM` may make an EngineCoreRequest of a prompt, whose own name counts.
        request_id = str(getattr(prompt, "request_id", request_id))
        noted.append(Addition(request_id, prompt, params, positional, named))
        return request_id

    def has_unfinished_requests() -> bool:
        raise _Enough

    def abort_request(*_: Any, **__: Any) -> None:
        """Nothing of what failed was added."""

    stand_ins = {
        "add_request": add_request,
        "has_unfinished_requests": has_unfinished_requests,
        "abort_request": abort_request,
    }
    before = {name: vars(inner)[name] for name in stand_ins if name in vars(inner)}
    vars(inner).update(stand_ins)
    try:
        getattr(llm, method)(prompts, sampling_params=sampling_params, use_tqdm=False, **arguments)
    except _Enough:
        pass
    finally:
        for name in stand_ins:
            del vars(inner)[name]
        vars(inner).update(before)
    return noted
