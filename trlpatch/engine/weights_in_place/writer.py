"""Write a model's policy weights into one engine, by a plan that was proven for it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trlpatch.engine.backend import RolloutBackend
from trlpatch.engine.weights_in_place import fused_merge, merge, reload
from trlpatch.engine.weights_in_place.plan import (
    NotInPlace,
    Plan,
    Proven,
    plan_for,
    prove,
    refuse_adapted_twins,
    structure_of,
)
from trlpatch.policy import bit_sums
from trlpatch.policy.policy_weights import PolicyWeight

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


_RELOAD = "vLLM's layerwise reload"


class WeightsWriter:
    """The plans of one engine, one per model, and what it has written.

    Every write is total: all parameters, from the trained tensors, never from what the engine holds.
    """

    def __init__(self, backend: RolloutBackend) -> None:
        self._backend = backend
        self._plans: weakref.WeakKeyDictionary[Module, Plan] = weakref.WeakKeyDictionary()
        self._refused: weakref.WeakKeyDictionary[Module, tuple[object, str]] = weakref.WeakKeyDictionary()
        self._proven: Proven = {}
        self.writes = 0
        self._by = "torch"
        self._unmoved: tuple[Tensor, int] | None = None

    @property
    def description(self) -> str:
        """For `trlpatch.status()`; waits for the device."""
        how = "loaded anew" if self._by == _RELOAD else "written in place"
        said = f"{how} ({self._by}, write {self.writes})"
        if self._unmoved is None:
            return said
        still, of = int(self._unmoved[0]), self._unmoved[1]
        return f"{said}, where {still / of:.1%} of the weights under the adapter round back to the base's"

    def known(self, base: Module, weights: list[PolicyWeight]) -> Plan | None:
        """Return the plan that has been proven for the model, if it is one for these parameters still."""
        plan = self._plans.get(base)
        return plan if plan is not None and plan.fits(weights) else None

    def plan(self, base: Module, weights: list[PolicyWeight]) -> tuple[Plan | None, bool]:
        """Return (new plan, True: it has to be proven); no plan where the engine's weights are reloaded instead.

        Raises:
            NotInPlace: the engine's parameters cannot be written directly.
        """
        structure = structure_of(weights)
        before, reason = self._refused.get(base, (None, ""))
        if before == structure:
            raise NotInPlace(reason)
        module = self._backend.worker_model()
        try:
            return plan_for(weights, module), True
        except NotInPlace as refusal:
            if reload.unsupported_reason(module) is None:
                refuse_adapted_twins(weights)
                return None, False
            self.refuse(base, weights, str(refusal))
            raise

    def refuse(self, base: Module, weights: list[PolicyWeight], reason: str) -> None:
        """Remember why a model's weights are not written, as long as it has these parameters."""
        self._refused[base] = structure_of(weights), reason

    def reload(self, weights: list[PolicyWeight], model_config: object) -> None:
        """Have vLLM load everything anew; the engine is idle."""
        import torch

        with torch.inference_mode(False), torch.no_grad(), merge.float32_products():
            reload.load(weights, self._backend.worker_model(), model_config)
        self._by, self._unmoved = _RELOAD, None
        self.writes += 1

    @staticmethod
    def copies(weights: list[PolicyWeight], plan: Plan) -> dict[int, Tensor]:
        """Where parameters that are trained whole go, by id, of those that are copied with their `ContentMark`."""
        return bit_sums.copies_of(
            (one.base, target)
            for one, target in zip(weights, plan.targets, strict=True)
            if target is not None and one.plain and one.base.requires_grad
        )

    def write(
        self,
        base: Module,
        weights: list[PolicyWeight],
        plan: Plan,
        *,
        unproven: bool,
        copied: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Write everything but what is `copied` on the current stream; the engine is idle, its weights are mapped.

        Raises:
            NotInPlace: the plan is wrong; the engine has what it had.
        """
        import torch

        with torch.inference_mode(False), torch.no_grad(), merge.float32_products():
            if unproven:
                try:
                    prove(plan, weights, self._backend.worker_model(), self._proven)
                except NotInPlace as refusal:
                    self.refuse(base, weights, str(refusal))
                    raise
            done = {id(target) for target in (copied or {}).values()}
            pairs = [
                (weight, target)
                for weight, target in zip(weights, plan.targets, strict=True)
                if target is not None and id(target) not in done
            ]
            merge.copy_all([pair for pair in pairs if pair[0].plain])
            fused = [pair for pair in pairs if fused_merge.mergeable(*pair)] if self._fused(pairs) else []
            chosen = {id(target) for _, target in fused}
            for weight, target in pairs:
                if not weight.plain and id(target) not in chosen:
                    merge.write(weight, target)
            if fused:
                fused_merge.write(fused)
            self._by = "Triton" if fused or done else "torch"
            self._plans[base] = plan
            self.writes += 1
            if self.writes & (self.writes - 1) == 0:  # reads everything once more: the 1st, 2nd, 4th, 8th, ... time
                self._unmoved = _unmoved(pairs)

    @staticmethod
    def _fused(pairs: list[tuple[PolicyWeight, Tensor]]) -> bool:
        return bool(pairs) and fused_merge.wanted(pairs[0][1].device)


def _unmoved(pairs: list[tuple[PolicyWeight, Tensor]]) -> tuple[Tensor, int] | None:
    """How many of the weights that an adapter changes are the base's after rounding, and of how many; None of none."""
    counts, of = [], 0
    for weight, target in pairs:
        if weight.plain:
            continue
        of += target.numel()
        for rows in merge.row_chunks(target):
            base = weight.base.detach()[rows].to(device=target.device, dtype=target.dtype)
            counts.append((target[rows] == base).sum())
    return (sum(counts[1:], counts[0]), of) if of else None
