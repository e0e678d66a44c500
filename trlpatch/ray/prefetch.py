"""Prefetch: GRPOTrainer's next batch is generated on Ray engines while this one is trained on.

Its completions are of the policy one update back. TRL corrects that itself: `vllm_importance_sampling_correction`
(TRL 0.23 and newer) weights by the ratio of the trainer's old log-probabilities, computed when the batch is used, to
the sampler's. Trainers that do not have the sampler's are refused.

What is asked is TRL's own: its `_generate_and_score_completions` runs with the next batch up to the call of the
engine, and what it would have asked there is asked in a thread. The same call, one step later, is given the answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trlpatch.errors import PrefetchNotSupported
from trlpatch.log import log_once, warn_once


def refuse_prefetch(trainer: Any, args: Any, depth: int) -> None:
    """See that batches can be generated ahead; called before the trainer is initialised.

    Raises:
        PrefetchNotSupported: they cannot, with the reason.
    """
    reason = _reason_against(trainer, args, depth)
    if reason is not None:
        raise _refusal(trainer, reason)


def _reason_against(trainer: Any, args: Any, depth: int) -> str | None:
    if depth != 1:
        return f"prefetch={depth!r}: one batch can be generated ahead, expected 0 or 1"
    if not any(cls.__name__ == "GRPOTrainer" for cls in type(trainer).__mro__):
        return (
            "its loss does not have the log-probabilities of the sampler; only GRPOTrainer corrects completions of an "
            "older policy"
        )
    if not hasattr(args, "vllm_importance_sampling_correction"):
        return "this TRL has no vllm_importance_sampling_correction, which came with 0.23"
    if not args.vllm_importance_sampling_correction:
        return "vllm_importance_sampling_correction=False: nothing would correct completions of an older policy"
    if getattr(args, "dataloader_num_workers", 0):
        return (
            f"dataloader_num_workers={args.dataloader_num_workers}: the next batch is in another process when it is "
            "to be generated; expected 0"
        )
    if getattr(args, "world_size", 1) > 1:
        return f"{args.world_size} ranks: they would ask for their next batches at different times"
    return None


def _refusal(trainer: Any, reason: str) -> PrefetchNotSupported:
    return PrefetchNotSupported(
        f"{type(trainer).__name__} with create_engines(prefetch=1): {reason}. Leave prefetch out"
    )


class _Captured(BaseException):
    """What TRL was about to ask the engine. Not an Exception: nothing of TRL's is to handle it."""

    def __init__(self, ask: _Ask) -> None:
        self.ask = ask


@dataclass(frozen=True)
class _Ask:
    """One call of the engine."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def asks_the_same(self, other: _Ask) -> bool:
        """Would the answers be to the same prompts, sampled alike? By which adapter is not asked."""
        try:
            return bool(self._what() == other._what())
        except Exception:  # prompts that cannot be compared, arrays for one
            return False

    def _what(self) -> Any:
        kwargs = {
            name: _value(value) for name, value in self.kwargs.items() if name not in ("lora_request", "use_tqdm")
        }
        return self.method, [_value(value) for value in self.args], kwargs


def _value(value: Any) -> Any:
    """SamplingParams compare by identity below vLLM 0.10; their text says all of them."""
    return repr(value) if type(value).__name__ == "SamplingParams" else value


class _Underway:
    """A batch that is generated in a thread."""

    def __init__(self, ask: _Ask, call: Callable[..., Any]) -> None:
        self.ask = ask
        self._answer: Future[Any] = Future()
        threading.Thread(target=self._run, args=(call,), name="trlpatch-prefetch", daemon=True).start()

    def _run(self, call: Callable[..., Any]) -> None:
        try:
            self._answer.set_result(call(*self.ask.args, **self.ask.kwargs))
        except BaseException as error:
            self._answer.set_exception(error)

    def wait(self) -> None:
        """Until it is answered, one way or the other."""
        self._answer.exception()

    def result(self) -> Any:
        """The answer.

        Raises:
            Whatever the engines have raised.
        """
        return self._answer.result()


class Prefetch:
    """Stands between one trainer and its engines.

    Attributes:
        used: batches that were generated ahead and trained on.
        wasted: those that were not what the trainer asked for.
    """

    def __init__(self, trainer: Any, generate: Callable[..., Any], chat: Callable[..., Any]) -> None:
        """Change methods of this trainer, which is not initialised yet; `generate` and `chat` are the engines' own."""
        self.used = self.wasted = 0
        self._trainer = trainer
        self._calls = {"generate": generate, "chat": chat}
        self._capturing = False
        self._underway: _Underway | None = None
        self._next: Any = None
        """The last batch that the data loader has made: it is one ahead."""
        self._current: Any = None
        self._checked = False
        self._own_loader = trainer.get_train_dataloader
        self._own_prepare = trainer._prepare_inputs
        self._own_generation = trainer._generate_and_score_completions
        trainer.get_train_dataloader = self._get_train_dataloader
        trainer._prepare_inputs = self._prepare_inputs
        trainer._generate_and_score_completions = self._generate_and_score

    def asked(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Answer for the engines: what was generated ahead, where it is what is asked for now."""
        ask = _Ask(method, args, kwargs)
        if self._capturing:
            raise _Captured(ask)
        underway = self._underway
        if underway is not None and self._trainer.model.training:
            self._underway = None
            if underway.ask.asks_the_same(ask):
                self.used += 1
                return list(underway.result())
            self.wasted += 1
            warn_once(self._trainer, "prefetch: a batch was generated ahead that the trainer does not ask for")
        return list(self._calls[method](*args, **kwargs))

    # In the trainer's place.

    def _get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        collate = trainer.data_collator

        def seen(features: Any) -> Any:
            self._next = collate(features)
            return self._next

        trainer.data_collator = seen
        try:
            return self._own_loader(*args, **kwargs)
        finally:
            trainer.data_collator = collate

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = self._own_prepare(inputs)
        if self._trainer.model.training and self._underway is None and not _same(self._next, self._current):
            self._start()
        return prepared

    def _generate_and_score(self, inputs: Any) -> Any:
        if self._underway is not None:
            # Before an adapter or weights are handed over: what is generated ahead is of one policy.
            self._underway.wait()
        if self._trainer.model.training:
            self._check()
            self._current = inputs
        return self._own_generation(inputs)

    def _start(self) -> None:
        ask = self._what_is_asked(self._next)
        if ask is not None:
            self._underway = _Underway(ask, self._calls[ask.method])

    def _what_is_asked(self, inputs: Any) -> _Ask | None:
        with self._capture():
            try:
                self._own_generation(inputs)
            except _Captured as captured:
                return captured.ask
        warn_once(self._trainer, "prefetch: nothing was asked of the engines for the next batch")
        return None

    @contextmanager
    def _capture(self) -> Iterator[None]:
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def _check(self) -> None:
        """What only an initialised trainer can say."""
        if self._checked:
            return
        trainer = self._trainer
        for name in ("rollout_func", "tools", "environments", "environment_factory"):
            if getattr(trainer, name, None):
                raise _refusal(trainer, f"{name} is set: what it asks the engines next depends on their answers")
        if getattr(trainer.args, "vllm_enable_sleep_mode", False):
            raise _refusal(trainer, "vllm_enable_sleep_mode=True: engines that sleep cannot generate meanwhile")
        self._checked = True
        log_once(trainer, "prefetch: the next batch is generated while this one is trained on")


def _same(batch: Any, other: Any) -> bool:
    """Is it the batch itself, or another copy of it? Each is given once for every step that trains on it."""
    if batch is other:
        return True
    try:
        return bool(batch == other)
    except Exception:  # arrays
        return False
