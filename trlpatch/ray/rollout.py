"""One call of `generate` or `chat` on all engines: sent by load, waited for, checked, put in order."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trlpatch.errors import WrongVersion
from trlpatch.ray.messages import BASE_ADAPTER, RolloutRequest, RolloutResponse
from trlpatch.ray.prompts import cost_of, kind_of, sequences_of
from trlpatch.ray.spread import Group, Spread, groups

if TYPE_CHECKING:
    from trlpatch.ray.facade import Asked
    from trlpatch.ray.protocols import Engines


class Rollout:
    """All or nothing: what one engine fails at, or answers with another version than asked for, is no rollout."""

    def __init__(
        self, engines: Engines, asked: Sequence[Asked], method: str, arguments: Mapping[str, Any], use_tqdm: Any
    ) -> None:
        self._engines = engines
        self._asked = asked
        self._method = method
        self._arguments = dict(arguments)
        self._key = uuid.uuid4().hex
        self._outputs: list[Any] = [None] * len(asked)
        self._bar = _bar(use_tqdm, len(asked))
        scheduler = getattr(engines.infos[0].vllm_config, "scheduler_config", None)
        window = int(getattr(scheduler, "max_num_seqs", 0) or 256)
        self._spread = Spread(self._groups(window), (), window)
        self._requests: dict[Group, RolloutRequest] = {}
        """What was asked for each group, last."""

    def outputs(self) -> list[Any]:
        """One `RequestOutput` a request, in order.

        Raises:
            RolloutFailed: prompts were given to two engines, and both were lost.
            NoEngineLeft: none is left, and none could be replaced.
            Whatever vLLM says of the prompts.
        """
        try:
            self._engines.supervisor.rollout(self._spread, self._ask, key=self._key, answered=self._answered)
        finally:
            if self._bar is not None:
                self._bar.close()
        return self._outputs

    def _groups(self, window: int) -> list[Group]:
        """By adapter: a message has one."""
        together: dict[str, list[int]] = {}
        for place, one in enumerate(self._asked):
            name = "" if one.lora_request is None else one.lora_request.lora_name
            together.setdefault(name, []).append(place)
        found: list[Group] = []
        for places in together.values():
            some = [self._asked[place] for place in places]
            kinds = [kind_of(one.prompt, place) for place, one in enumerate(some)]
            made = groups(
                [cost_of(one.prompt, one.params) for one in some],
                [sequences_of(one.params) for one in some],
                kinds,
                len(self._engines.handles),
                window,
            )
            found += [
                dataclasses.replace(group, places=tuple(places[place] for place in group.places)) for group in made
            ]
        return found

    def _request(self, group: Group) -> RolloutRequest:
        some = [self._asked[place] for place in group.places]
        params = [one.params for one in some]
        lora = some[0].lora_request
        adapter = self._engines.adapter_of(lora)
        extra = {name: [one.arguments[name] for one in some] for name in some[0].arguments}
        return RolloutRequest(
            [one.prompt for one in some],
            None if all(one is None for one in params) else params,
            adapter=adapter,
            lora_request=None if adapter else lora,
            weights=self._engines.weights_version,
            method=self._method,
            arguments={**self._arguments, **extra},
            key=self._key,
        )

    def _ask(self, engine: int, group: Group) -> Any:
        self._requests[group] = self._request(group)
        return self._engines.submit(engine, self._requests[group])

    def _answered(self, group: Group, response: RolloutResponse) -> None:
        require_asked(response, self._requests[group])
        for place, output in zip(group.places, response.outputs, strict=True):
            self._outputs[place] = output
        if self._bar is not None:
            self._bar.update(len(group.places))


def require_asked(response: RolloutResponse, request: RolloutRequest) -> None:
    """See that every token was sampled with the versions that were asked for.

    Raises:
        WrongVersion: they changed meanwhile, or are others.
    """
    for version in (response.first_version, response.last_version):
        if request.weights not in (None, version.weights) or request.adapter not in (
            None,
            BASE_ADAPTER,  # whatever adapter the engine holds, these did not use it
            version.adapter,
        ):
            raise WrongVersion(
                f"rollout engine {response.engine} sampled with {version}, asked for was adapter "
                f"{request.adapter or 'none'}, weights {request.weights}; the response is not used. Somebody else "
                "updates this engine: expected one trainer for an engine"
            )


def _bar(use_tqdm: Any, total: int) -> Any:
    if not use_tqdm:
        return None
    from tqdm.auto import tqdm

    make: Callable[..., Any] = use_tqdm if callable(use_tqdm) else tqdm
    return make(total=total, desc="Processed prompts", dynamic_ncols=True)
