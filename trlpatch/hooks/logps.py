"""Per-token log-probabilities in chunks: GRPO and RLOO never hold the logits of a whole batch.

The hook around the model's forward pass lets its output embeddings return hidden states in place of logits; the hooks
around TRL's `selective_log_softmax` and `entropy_from_logits` make logits for some tokens at a time and call TRL's own
function for those. Where it is not certain that this computes the same, the logits are made as in stock, and status()
says why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from trlpatch.log import log_once, warn_once

if TYPE_CHECKING:
    from trlpatch.policy.deferred_logits import DeferredLogits

_ENTROPIES = "entropies"
_GIB = 2**30


@dataclass
class _Chunking:
    """What became of one trainer's logits.

    Attributes:
        chunked: how many passes reduced their logits in chunks.
        small: how many passes had logits that fit in one chunk.
        chunk: tokens of a chunk, of the largest pass.
        held: bytes of logits of a chunk, of the largest pass.
        stock: bytes of all logits of the largest pass.
        reason: why some pass made its logits as a whole; empty if none did.
    """

    chunked: int = 0
    small: int = 0
    chunk: int = 0
    held: int = 0
    stock: int = 0
    reason: str = ""


@dataclass(frozen=True)
class _Watcher:
    """Keeps an account of one trainer's deferred logits."""

    trainer: Any
    chunking: _Chunking

    def whole(self, reason: str) -> None:
        self.chunking.reason = reason
        warn_once(self.trainer, f'logps="chunked": logits of a whole batch are held, as in stock: {reason}')

    def reduced(self, logits: DeferredLogits, tokens: int, chunk: int) -> None:
        chunking, a_token = self.chunking, logits.shape[2] * logits.dtype.itemsize
        if chunk >= tokens:
            chunking.small += 1
            return
        log_once(self.trainer, 'logps="chunked": log-probabilities are computed in chunks of tokens')
        chunking.chunked += 1
        if tokens * a_token > chunking.stock:
            chunking.chunk, chunking.held, chunking.stock = chunk, chunk * a_token, tokens * a_token


_known: weakref.WeakKeyDictionary[Any, _Chunking] = weakref.WeakKeyDictionary()


def deferred_logits(trainer: Any, model: Any) -> Callable[..., Any]:
    """Stand where TRL calls `model` for logits: the same call, whose `logits` may be `DeferredLogits`."""
    watcher = _Watcher(trainer, _known.setdefault(trainer, _Chunking()))
    head, reason = _head_of(model)
    if reason:
        watcher.whole(reason)
        return model  # type: ignore[no-any-return]

    def forward(*args: Any, **kwargs: Any) -> Any:
        from trlpatch.policy.deferred_logits import deferring

        with deferring(head, watcher) as calls:
            outputs = model(*args, **kwargs)
        if not calls:
            watcher.whole(f"the forward pass of {type(model).__name__} does not call its output embeddings")
        return outputs

    return forward


def selective_log_softmax(
    compute: Callable[..., Any], entropy: Callable[..., Any] | None = None, compute_entropy: bool = False
) -> Callable[..., Any]:
    """Stand where TRL calls `selective_log_softmax`.

    Where `compute_entropy` says that TRL wants entropies next, `entropy` makes them of the same chunks.
    """

    def reduced(logits: Any, index: Any, **kwargs: Any) -> Any:
        if not _is_deferred(logits):
            return compute(logits, index, **kwargs)
        reductions = [lambda chunk, **of_chunk: (compute(chunk, **of_chunk),)]
        if entropy is not None and compute_entropy:
            reductions.append(lambda chunk, **_: (entropy(chunk),))
        logps, *entropies = _reduce(logits, reductions, {"index": index, **kwargs})
        if entropies:
            (logits.known[_ENTROPIES],) = entropies
        return logps

    return reduced


def entropy_from_logits(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Stand where TRL calls `entropy_from_logits`, with gradients or without."""

    def reduced(logits: Any) -> Any:
        import torch

        if not _is_deferred(logits):
            return compute(logits)
        found = logits.known.pop(_ENTROPIES, None)
        if found is None:
            (found,) = _reduce(logits, [lambda chunk: (compute(chunk),)], {})
        return found if torch.is_grad_enabled() else found.detach()

    return reduced


def selective_log_softmax_and_entropy(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Stand where TRL 1.14 calls its function of that name."""

    def reduced(logits: Any, index: Any, *, entropy_requires_grad: bool, **kwargs: Any) -> Any:
        both = partial(compute, entropy_requires_grad=entropy_requires_grad)
        if not _is_deferred(logits):
            return both(logits, index, **kwargs)
        logps, entropies = _reduce(logits, [both], {"index": index, **kwargs})
        return logps, entropies if entropy_requires_grad else entropies.detach()

    return reduced


def describe() -> list[str]:
    """Return a line per live trainer, for `trlpatch.status()`."""
    return [f"{type(trainer).__name__}: {_described(chunking)}" for trainer, chunking in list(_known.items())]


def _described(chunking: _Chunking) -> str:
    parts = []
    if chunking.chunked:
        parts.append(
            f"{chunking.chunked} passes in chunks, the largest of {chunking.chunk} tokens with "
            f"{chunking.held / _GIB:.2g} GiB of logits where stock has {chunking.stock / _GIB:.2g} GiB"
        )
    if chunking.small:
        parts.append(f"{chunking.small} passes with logits of one chunk, as in stock")
    if chunking.reason:
        parts.append(f"logits of a whole batch are held, as in stock: {chunking.reason}")
    return "; ".join(parts) or "no pass yet"


def _is_deferred(logits: Any) -> bool:
    from trlpatch.policy.deferred_logits import DeferredLogits

    return isinstance(logits, DeferredLogits)


def _reduce(logits: DeferredLogits, reductions: list[Any], arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Call `reduce_per_token`: tensors among `arguments` belong to tokens, the others are for every chunk."""
    import torch

    from trlpatch.policy.deferred_logits import reduce_per_token

    per_token = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in arguments.items() if name not in per_token}
    bound = [partial(reduction, **others) for reduction in reductions]
    return reduce_per_token(logits, bound, **per_token)


def _head_of(model: Any) -> tuple[Any, str]:
    """Return a model's output embeddings, or the reason why their call cannot be deferred."""
    import torch
    from torch.distributed.tensor import DTensor
    from torch.nn.modules.module import _has_any_global_hook

    parallel = type(model) is torch.nn.parallel.DistributedDataParallel
    if parallel and model.static_graph:
        return None, "the model is wrapped in DistributedDataParallel(static_graph=True)"
    model = model.module if parallel else model
    name = type(model).__name__
    if type(model).__module__.split(".")[0] in ("torch", "deepspeed"):
        return None, f"the model is wrapped in {name}"
    if model._compiled_call_impl is not None or _has_any_global_hook():
        return None, "the model is compiled, or every module has hooks"
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        return None, f"{name} has no output embeddings"
    if type(head) is not torch.nn.Linear:
        return None, f"lm_head is {type(head).__module__}.{type(head).__name__}, not torch.nn.Linear"
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks or head._backward_hooks:
        return None, "lm_head has hooks"
    if any(isinstance(tensor, DTensor) or hasattr(tensor, "ds_id") for tensor in (head.weight, head.bias)):
        return None, "lm_head is sharded over ranks"
    if parallel and any(parameter.requires_grad for parameter in head.parameters()):
        # It is used after the forward pass, where DistributedDataParallel takes it for unused.
        return None, "lm_head is trained, and the model is wrapped in DistributedDataParallel"
    return head, ""
