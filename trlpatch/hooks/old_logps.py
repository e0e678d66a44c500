"""Old log-probabilities: leave out TRL's no-grad pass for them where the training forward has the same numbers.

While on-policy, `old_per_token_logps` is what the loss computes anyway. What TRL makes of it at generation time, the
importance sampling ratio and the `sampling/*` metrics, is made here when the loss has its log-probabilities.

In a trainer's first three steps the pass runs, and twice: if the results are not equal to the bit, something is random
and every pass runs. (Three, because LoRA's B is zero before an update and hides what is random in an adapter, and the
first learning rate of a warm-up is zero too.) The training forward is compared with the pass as well, and status()
says how far apart they are: kernels whose result for a row depends on the rows beside it round differently.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trlpatch.errors import StaleOldLogps
from trlpatch.hooks.on_policy import reason_against
from trlpatch.log import log_once, warn_once

_MODE = "train"
_CHECKED_STEPS = 3


class _Late(NamedTuple):
    """What TRL's metrics need of one micro-batch."""

    old: Any
    sampling: Any
    ratio: Any
    mask: Any


@dataclass
class _Reuse:
    """What became of one trainer's passes.

    Attributes:
        checked: the optimizer steps in which two passes were equal.
        returned: how many values the pass returns: 2, from TRL 1.7 on 3.
        reason: why the pass runs; empty where it is left out.
        random: the reason that stays: two passes over the same batch differ.
        left_out: how many passes were left out.
        step: optimizer step in which the pass of the batch in use was left out; None if it ran.
        comparing: the batch in use is the one whose pass is compared with the training forward.
        difference: largest difference between the two, in nats; None until they were compared.
        late: micro-batches of the batch in use whose metrics are not logged yet.
    """

    checked: set[int] = field(default_factory=set)
    returned: int = 0
    reason: str = ""
    random: str = ""
    left_out: int = 0
    step: int | None = None
    comparing: bool = False
    difference: float | None = None
    late: list[_Late] = field(default_factory=list)


_known: weakref.WeakKeyDictionary[Any, _Reuse] = weakref.WeakKeyDictionary()


def old_logps(trainer: Any, compute: Callable[..., Any]) -> Callable[..., Any]:
    """Stand where TRL calls `_get_per_token_logps_and_entropies` for `old_per_token_logps`.

    `compute` is that method. Where the pass is left out, what is returned yields None for each of its values.
    """
    if not trainer.model.training:  # an evaluation, maybe between two micro-batches
        return compute
    reuse = _known.setdefault(trainer, _Reuse())
    _log_late(trainer, reuse)
    reuse.step, reuse.comparing = None, False
    reuse.reason = reuse.random or reason_against(trainer)
    if reuse.reason:
        warn_once(trainer, f'old_logps="reuse": the pass for old log-probabilities runs, {reuse.reason}')
        return compute
    if len(reuse.checked) < _CHECKED_STEPS or trainer.state.global_step in reuse.checked:
        return _checked(trainer, reuse, compute)
    log_once(trainer, 'old_logps="reuse": the pass for old log-probabilities is left out')
    reuse.left_out += 1
    reuse.step = trainer.state.global_step
    return lambda *_, **__: (None,) * reuse.returned


def _checked(trainer: Any, reuse: _Reuse, compute: Callable[..., Any]) -> Callable[..., Any]:
    def twice(*args: Any, **kwargs: Any) -> Any:
        import torch

        found = compute(*args, **kwargs)
        device = trainer.accelerator.device
        # Whatever the second pass draws, training goes on as if there had been one.
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
            again = compute(*args, **kwargs)
        equal = torch.tensor([torch.equal(found[0], again[0])], device=device)
        if bool(trainer.accelerator.gather(equal).all()):
            reuse.checked.add(trainer.state.global_step)
            reuse.returned, reuse.comparing = len(found), True
        else:
            reuse.random = reuse.reason = (
                "two passes over the same completions differ: something in the model is random, "
                "or a kernel is not deterministic"
            )
            warn_once(trainer, f'old_logps="reuse": the pass for old log-probabilities runs, {reuse.reason}')
        return found

    return twice


def keep_sampling_logps(batch: dict[str, Any], old: Any, sampling: Any) -> None:
    """Give the loss the engine's log-probabilities, which GRPO below 0.27.1 keeps to itself."""
    if old is None and sampling is not None:
        batch["sampling_per_token_logps"] = sampling


def importance_sampling_ratio(trainer: Any, inputs: dict[str, Any], per_token_logps: Any) -> None:
    """In GRPO's loss, put `importance_sampling_ratio` into a batch whose pass was left out.

    Raises:
        StaleOldLogps: the weights changed since the batch was generated.
    """
    reuse = _known.get(trainer)
    if reuse is None or not trainer.model.training:
        return
    old = inputs.get("old_per_token_logps")
    if old is not None:
        _compare(trainer, reuse, old, per_token_logps, _mask(inputs))
    elif reuse.step is not None:
        _check_step(trainer, reuse)
        if "importance_sampling_ratio" not in inputs:  # there from the iteration before, if num_iterations > 1
            _correct(trainer, reuse, inputs, per_token_logps)


def old_sequence_logps(trainer: Any, inputs: dict[str, Any], logps: Any) -> Any:
    """In RLOO's loss, return the batch's `old_logps`, or the training forward's where its pass was left out.

    Raises:
        StaleOldLogps: the weights changed since the batch was generated.
    """
    old, reuse = inputs["old_logps"], _known.get(trainer)
    if old is None:
        assert reuse is not None
        _check_step(trainer, reuse)
        return logps.detach()
    if reuse is not None and trainer.model.training:
        _compare(trainer, reuse, old, logps)
    return old


def describe() -> list[str]:
    """Return a line per live trainer, for `trlpatch.status()`."""
    return [f"{type(trainer).__name__}: {_described(reuse)}" for trainer, reuse in list(_known.items())]


def _described(reuse: _Reuse) -> str:
    if reuse.reason:
        return f"the pass runs, {reuse.reason}"
    if reuse.difference is None:
        return "the pass runs, to be compared with the training forward"
    compared = f"differed from the pass by up to {reuse.difference:.1e}" if reuse.difference else "equalled the pass"
    return f"{reuse.left_out} passes left out; the training forward {compared} in steps {_listed(reuse.checked)}"


def _listed(steps: set[int]) -> str:
    return ", ".join(map(str, sorted(steps)))


def _mask(inputs: dict[str, Any]) -> Any:
    tool_mask = inputs.get("tool_mask")
    return inputs["completion_mask"] if tool_mask is None else inputs["completion_mask"] * tool_mask


def _compare(trainer: Any, reuse: _Reuse, old: Any, new: Any, mask: Any = None) -> None:
    if not reuse.comparing:
        return
    apart = (old - new.detach()).abs()
    if mask is not None:
        apart = apart[mask.bool()]
    reuse.difference = max(reuse.difference or 0.0, float(apart.max()) if apart.numel() else 0.0)
    if reuse.difference:
        warn_once(
            trainer,
            'old_logps="reuse": the training forward is not equal to the bit to the pass that it replaces; '
            "trlpatch.status() has the difference",
        )


def _check_step(trainer: Any, reuse: _Reuse) -> None:
    if reuse.step != trainer.state.global_step:
        raise StaleOldLogps(
            f"{type(trainer).__name__}: the batch in use was generated in step {reuse.step}, its pass for old "
            f"log-probabilities was left out, and the weights were updated since: this is step "
            f"{trainer.state.global_step}. An interrupted train() leaves such a batch; build a new trainer, or call "
            'PatchFastRL(old_logps="stock") in a new process.'
        )


def _correct(trainer: Any, reuse: _Reuse, inputs: dict[str, Any], per_token_logps: Any) -> None:
    if not (trainer.use_vllm and trainer.vllm_importance_sampling_correction):
        return
    import torch

    mask, sampling = _mask(inputs), inputs["sampling_per_token_logps"]
    # TRL makes the ratio outside of the loss's autocast, in which sums and exponentials have other dtypes.
    with torch.no_grad(), torch.autocast(per_token_logps.device.type, enabled=False):
        old = per_token_logps.detach()
        ratio = _ratio(trainer, torch.nan_to_num((old - sampling) * mask, nan=0.0))
    inputs["importance_sampling_ratio"] = ratio
    reuse.late.append(_Late(old, sampling, ratio, mask.bool()))
    if len(reuse.late) == trainer.args.steps_per_generation:
        _log_late(trainer, reuse)


def _ratio(trainer: Any, difference: Any) -> Any:
    """TRL's formula in every release: 0.23-0.25 know `token_truncate` alone, `_clip_min` came with 1.6."""
    import torch

    level, _, bound = getattr(trainer, "vllm_importance_sampling_mode", "token_truncate").partition("_")
    low = getattr(trainer, "vllm_importance_sampling_clip_min", None)
    cap = "vllm_importance_sampling_clip_max"
    high = getattr(trainer, cap if hasattr(trainer, cap) else "vllm_importance_sampling_cap")
    if level == "sequence":
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = torch.exp(difference)
    if bound == "truncate":
        return torch.clamp(ratio, min=low, max=high)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside |= ratio < low
    if high is not None:
        outside |= ratio > high
    return ratio.masked_fill(outside, value=0.0)


def _log_late(trainer: Any, reuse: _Reuse) -> None:
    """Log TRL's `sampling/*` metrics once per generation batch; means are over the same tokens in another order."""
    if not reuse.late:
        return
    import torch

    old, sampling, ratio, mask = (torch.cat(parts) for parts in zip(*reuse.late, strict=True))
    reuse.late.clear()
    delta = torch.abs(old - sampling)
    delta = delta[mask & ~torch.isnan(delta)]
    ratio = ratio[mask] if ratio.shape == mask.shape else ratio.flatten()
    nothing = torch.zeros(1, device=old.device)
    delta, ratio = delta if delta.numel() else nothing, ratio if ratio.numel() else nothing
    statistics = {
        "sampling/sampling_logp_difference/mean": (delta, torch.mean, torch.mean),
        "sampling/sampling_logp_difference/max": (delta, torch.max, torch.max),
        "sampling/importance_sampling_ratio/min": (ratio, torch.min, torch.min),
        "sampling/importance_sampling_ratio/mean": (ratio, torch.mean, torch.mean),
        "sampling/importance_sampling_ratio/max": (ratio, torch.max, torch.max),
    }
    for name, (values, here, over_ranks) in statistics.items():
        trainer._metrics[_MODE][name].append(over_ranks(trainer.accelerator.gather(here(values))).item())
