"""Logits that are computed where they are used, and in chunks: `DeferredLogits` and its autograd Function.

A model's forward pass makes logits [batch, length, vocab] only for TRL to reduce each position to one log-probability
and one entropy. `deferring` lets the output embeddings (`lm_head`) return the hidden states instead, as an object that
notes what the model and TRL do with logits: slices, a temperature, soft-capping, a scale, `float()`. Reduced by
`reduce_per_token`, they are made for some tokens at a time, by the same operations in the same order and under the
same autocast; backward makes them again. Everything else that is asked of the object gets the logits, as they were
without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

CHUNK_ELEMENTS = 2**26
"""Logits per chunk: 256 MiB in float32, 441 tokens of a vocabulary of 152 000. Fewer are computed as stock does."""


class Watcher(Protocol):
    """Whoever wants to know what becomes of deferred logits."""

    def whole(self, reason: str) -> None:
        """Somebody needs the logits of the whole batch."""

    def reduced(self, logits: DeferredLogits, tokens: int, chunk: int) -> None:
        """They were reduced to values of so many tokens, in chunks of so many."""


Reduction = Callable[..., tuple[Tensor, ...]]
"""Makes tensors [1, tokens] of logits [1, tokens, vocab] and, by keyword, of what belongs to these tokens."""


class _Autocast(NamedTuple):
    """The autocast state of one operation."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> _Autocast:
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def __call__(self) -> torch.autocast:
        dtype = self.dtype if self.enabled else None
        return torch.autocast(self.device_type, dtype, self.enabled, cache_enabled=False)


class _Step(NamedTuple):
    """One operation on logits: a slice of their first two dimensions, or a function of single elements."""

    function: Callable[[Tensor], Tensor]
    autocast: _Autocast
    slices: bool

    def __call__(self, value: Tensor) -> Tensor:
        with self.autocast():
            return self.function(value)


@dataclass(frozen=True, eq=False)
class _Head:
    """Output embeddings, an `nn.Linear`, as they are called."""

    linear: nn.Linear
    autocast: _Autocast
    contiguous: bool
    """Whether it multiplies a contiguous tensor: for others, torch adds the bias to a product that is rounded."""

    @classmethod
    def called_with(cls, linear: nn.Linear, hidden: Tensor) -> _Head:
        head = cls(linear, _Autocast.now(hidden.device.type), hidden.is_contiguous())
        return head if hidden.dtype == head.dtype else replace(head, contiguous=True)  # a cast copies

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that they multiply in."""
        weight = self.linear.weight.dtype
        return self.autocast.dtype if self.autocast.enabled and weight != torch.float64 else weight

    def __call__(self, hidden: Tensor) -> Tensor:
        with self.autocast():
            return functional.linear(hidden, self.linear.weight, self.linear.bias)

    def of_tokens(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return logits [tokens, vocab] of hidden states [tokens, features], rounded as those of a call."""
        with torch.autocast(self.autocast.device_type, enabled=False):
            hidden = hidden.to(weight.dtype)
            if bias is None or self.contiguous:
                return functional.linear(hidden, weight, bias)
            return functional.linear(hidden, weight).add_(bias)


@dataclass(eq=False)
class DeferredLogits:
    """Logits [batch, length, vocab] that do not exist yet.

    Attributes:
        hidden: hidden states [batch, length, features] that the head was called with.
        head: the output embeddings.
        watcher: is told what becomes of the logits.
        steps: what was done with the logits since.
        grad: whether gradients were recorded when the head was called.
        known: what `reduce_per_token` has made besides its first result, by name.
    """

    # A dataclass: DistributedDataParallel looks for tensors in the fields of one, and finds `hidden`.
    hidden: Tensor
    head: _Head
    watcher: Watcher
    grad: bool
    steps: tuple[_Step, ...] = ()
    known: dict[str, Tensor] = field(default_factory=dict)
    _whole: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the logits would have."""
        probe = torch.empty(0, dtype=self.head.dtype, device=self.hidden.device)
        for step in self.steps:
            probe = probe if step.slices else step(probe)
        return probe.dtype

    @property
    def device(self) -> torch.device:
        """The device of the hidden states, and of the logits."""
        return self.hidden.device

    @property
    def shape(self) -> torch.Size:
        """[batch, length, vocab]."""
        return torch.Size((*self._sliced().shape[:2], self.head.linear.out_features))

    @property
    def ndim(self) -> int:
        """Three."""
        return 3

    def whole(self, reason: str) -> Tensor:
        """Return the logits as the model would have returned them, once; the watcher hears of it."""
        self.watcher.whole(reason)
        return self._made()

    def _made(self) -> Tensor:
        if self._whole is None:
            with torch.set_grad_enabled(self.grad):
                logits = self.head(self.hidden)
                for step in self.steps:
                    logits = step(logits)
            self._whole = logits
        return self._whole

    def _sliced(self) -> Tensor:
        hidden = self.hidden
        with torch.set_grad_enabled(self.grad):
            for step in self.steps:
                hidden = step(hidden) if step.slices else hidden
        return hidden

    def _with(self, function: Callable[[Tensor], Tensor], *, slices: bool = False) -> Any:
        if self._whole is not None:  # somebody has the logits, and may have written into them
            return function(self._whole)
        step = _Step(function, _Autocast.now(self.device.type), slices)
        return replace(self, steps=(*self.steps, step), known={})

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if all(isinstance(part, slice) for part in parts) and parts[2:] in ((), (slice(None),)):
            return self._with(lambda value: value[parts], slices=True)
        return self.whole(f"logits[{index}]")[index]

    def __truediv__(self, other: Any) -> Any:
        if not _is_number(other):
            return self.whole("a quotient of logits and a tensor") / other
        return self._with(lambda value: value / other)

    def __mul__(self, other: Any) -> Any:
        if not _is_number(other):
            return self.whole("a product of logits and a tensor") * other
        return self._with(lambda value: value * other)

    def __rmul__(self, other: Any) -> Any:
        return self * other

    def div_(self, other: Any) -> DeferredLogits:
        """Divide, in place: whoever holds this object sees it."""
        if self._whole is not None or not _is_number(other):
            self.whole("a quotient of logits and a tensor").div_(other)
            return self
        self.steps, self.known = (self / other).steps, {}
        return self

    def tanh(self) -> Any:
        """Hyperbolic tangent, of soft-capping."""
        return self._with(torch.tanh)

    def float(self) -> Any:
        """Logits in float32."""
        return self if self.dtype == torch.float32 else self._with(Tensor.float)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(f"logits.{name}"), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        reason = f"{getattr(function, '__name__', function)}() of logits"
        made = tree_map(lambda value: value.whole(reason) if isinstance(value, cls) else value, (args, kwargs or {}))
        return function(*made[0], **made[1])


def _of_whole(name: str) -> Callable[..., Any]:
    def method(logits: DeferredLogits, *arguments: Any) -> Any:
        return getattr(logits.whole(f"logits.{name}"), name)(*arguments)

    return method


_OPERATORS = ("add", "radd", "sub", "rsub", "rtruediv", "neg", "abs", "pow", "matmul", "lt", "le", "gt", "ge")
for _name in (*_OPERATORS, "len", "setitem"):
    setattr(DeferredLogits, f"__{_name}__", _of_whole(f"__{_name}__"))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


@contextmanager
def deferring(linear: nn.Linear, watcher: Watcher) -> Iterator[list[Tensor]]:
    """Let `linear`, a model's output embeddings, return `DeferredLogits`; yield what it has been called with."""
    calls: list[Tensor] = []

    def forward(hidden: Tensor) -> Any:
        calls.append(hidden)
        head = _Head.called_with(linear, hidden)
        if hidden.ndim != 3 or hidden.device != linear.weight.device or not _multiplies(head, hidden):
            watcher.whole(f"lm_head is called with {hidden.dtype} {tuple(hidden.shape)} on {hidden.device}")
            return functional.linear(hidden, linear.weight, linear.bias)
        return DeferredLogits(hidden, head, watcher, torch.is_grad_enabled())

    linear.forward = forward
    try:
        yield calls
    finally:
        del linear.forward


def _multiplies(head: _Head, hidden: Tensor) -> bool:
    return head.autocast.enabled or hidden.dtype == head.linear.weight.dtype


def reduce_per_token(
    logits: DeferredLogits, reductions: Sequence[Reduction], **per_token: Tensor
) -> tuple[Tensor, ...]:
    """Reduce logits to tensors [batch, length], in chunks of tokens that have `CHUNK_ELEMENTS` logits at most.

    Args:
        logits: of [batch, length, vocab].
        reductions: each called with logits [1, tokens, vocab] and these tokens' part of `per_token`; with all of
            them, [batch, length, vocab], if they fit in one chunk. Backward calls those whose results have a gradient.
        per_token: tensors [batch, length], given to every reduction by keyword.

    Returns:
        The results of all reductions, [batch, length] each. Gradients reach hidden states, weight and bias.
    """
    batch, length, vocab = logits.shape
    tokens = chunk_tokens(batch * length, vocab)
    if logits._whole is None:
        logits.watcher.reduced(logits, batch * length, tokens)
    if tokens >= batch * length or logits._whole is not None:
        whole = logits._made()
        return tuple(result for reduction in reductions for result in reduction(whole, **per_token))
    hidden = logits._sliced().reshape(batch * length, -1)
    names, autocast = tuple(per_token), _Autocast.now(logits.device.type)
    replay = _Replay(logits.head, logits.steps, tuple(reductions), names, autocast, tokens)
    linear = logits.head.linear
    flat = (tensor.reshape(-1) for tensor in per_token.values())
    found = _Chunked.apply(replay, hidden, linear.weight, linear.bias, *flat)
    return tuple(tensor.view(batch, length) for tensor in found)


def chunk_tokens(tokens: int, vocab: int) -> int:
    """Return how many of so many tokens make a chunk: all chunks of about one size, `CHUNK_ELEMENTS` at most."""
    most = max(CHUNK_ELEMENTS // vocab, 1)
    chunks = math.ceil(tokens / most)
    return math.ceil(tokens / max(chunks, 1))


@dataclass(frozen=True, eq=False)
class _Replay:
    """How the logits of some tokens are made and reduced."""

    head: _Head
    steps: Sequence[_Step]
    reductions: Sequence[Reduction]
    names: Sequence[str]
    autocast: _Autocast
    tokens: int

    def __call__(
        self, reductions: Sequence[Reduction], hidden: Tensor, weight: Tensor, bias: Any, *per_token: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """Return the results of each reduction; `weight` and `bias` have the dtype that the head multiplies in."""
        logits = self.head.of_tokens(hidden, weight, bias)[None]
        for step in self.steps:
            logits = logits if step.slices else step(logits)
        named = {name: tensor[None] for name, tensor in zip(self.names, per_token, strict=True)}
        with self.autocast():
            return [reduction(logits, **named) for reduction in reductions]

    def multiplied(self, tensor: Tensor | None) -> Tensor | None:
        """Return a parameter of the head as it is multiplied, apart from the graph."""
        return None if tensor is None else tensor.detach().to(self.head.dtype)


class _Chunked(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """Reduce logits chunk by chunk; backward makes each chunk of logits again."""

    @staticmethod
    def forward(ctx: Any, replay: _Replay, hidden: Tensor, weight: Tensor, bias: Any, *per_token: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, *per_token)
        parameters = replay.multiplied(weight), replay.multiplied(bias)
        chunks = []
        for part, *rest in zip(*(tensor.split(replay.tokens) for tensor in (hidden, *per_token)), strict=True):
            results = replay(replay.reductions, part, *parameters, *rest)
            ctx.sizes = [len(result) for result in results]
            chunks.append([tensor for result in results for tensor in result])
        ctx.replay = replay
        return tuple(torch.cat(values, dim=1)[0] for values in zip(*chunks, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        replay: _Replay = ctx.replay
        saved = ctx.saved_tensors
        hidden, *parameters = saved[:3]
        needs = ctx.needs_input_grad[1:4]
        per_result, rest = [], list(grads)
        for reduction, size in zip(replay.reductions, ctx.sizes, strict=True):
            if any(grad is not None for grad in rest[:size]):
                per_result.append((reduction, rest[:size]))
            rest = rest[size:]
        if not per_result:
            return (None,) * (1 + len(saved))
        multiplied = [replay.multiplied(tensor) for tensor in parameters]
        for parameter, need in zip(multiplied, needs[1:], strict=True):
            if parameter is not None and need:
                parameter.requires_grad_()
        to_hidden = torch.zeros_like(hidden) if needs[0] else None
        # Stock sums over all tokens in one product; sums of chunks are kept in float32 at least.
        totals = [_zeros(tensor) if need else None for tensor, need in zip(parameters, needs[1:], strict=True)]
        for start in range(0, len(hidden), replay.tokens):
            here = slice(start, start + replay.tokens)
            part = hidden[here].detach().requires_grad_(needs[0])
            with torch.enable_grad():
                per_token = (tensor[here] for tensor in saved[3:])
                results = replay([reduction for reduction, _ in per_result], part, *multiplied, *per_token)
            pairs = [
                (value, grad[None, here])
                for result, (_, upstream) in zip(results, per_result, strict=True)
                for value, grad in zip(result, upstream, strict=True)
                if grad is not None and value.requires_grad
            ]
            wanted = [tensor for tensor, need in zip((part, *multiplied), needs, strict=True) if need]
            values, upstreams = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(values, wanted, upstreams))
            del results, pairs, values  # they hold this chunk's logits
            if to_hidden is not None:
                to_hidden[here] = next(found)
            for total in totals:
                if total is not None:
                    total += next(found)
        of_parameters = (
            None if total is None else total.to(tensor.dtype) for total, tensor in zip(totals, parameters, strict=True)
        )
        return None, to_hidden, *of_parameters, *(None for _ in saved[3:])


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
