"""What tells whether an engine has a policy: marks that are equal as long as the policy is."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trlpatch.policy.base_weights import spot_of
from trlpatch.policy.bit_sums import bit_sums
from trlpatch.policy.change_detection import ContentSums, Sums
from trlpatch.policy.policy_weights import PolicyWeight, tensors_of

if TYPE_CHECKING:
    from torch import Tensor

_Known = tuple[list[tuple[object, ...]], ContentSums]
_sums_by_model: weakref.WeakKeyDictionary[object, _Known] = weakref.WeakKeyDictionary()
"""The views and keys that sums are made with take ten times as long as the sums."""


class ContentMark:
    """What is equal as long as the policy is: its structure, and the bits of what is trained.

    Factors of adapters are summed by place, which sees any change; parameters that are trained whole by their bits.
    Frozen parameters count by storage, version and the bits of a piece: what is written through `.data`, which moves
    no version, is seen where it changes the piece, as a scaled or replaced weight does.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, weights: list[PolicyWeight], model: object = None, copies: Mapping[int, Tensor] | None = None
    ) -> None:
        """`model`, where one is given, remembers how its factors are summed, until it is gone.

        `copies`: what `bit_sums.copies_of` has found, by id of a base that is trained; they are made with its sums.
        """
        import torch

        copies = copies or {}
        self._structure = [
            (one.path, one.base.data_ptr(), one.base.dtype, [term.scale for term in one.terms], one.magnitude is None)
            for one in weights
        ]
        self._versions = [_version_of(one.base) for one in weights if not one.base.requires_grad]
        factors = [tensor for one in weights if not one.plain for tensor in list(tensors_of(one))[1:]]
        frozen = [one.base for one in weights if not one.base.requires_grad and one.base.is_contiguous()]
        whole = {id(one.base): one.base.detach() for one in weights if one.base.requires_grad}
        with torch.inference_mode(False), torch.no_grad():
            self._sums: list[Sums] = _sums_of(factors, frozen, model).now() if factors or frozen else []
            self._sums += bit_sums(list(whole.values()), [copies.get(key) for key in whole])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ContentMark):
            return NotImplemented
        return self._structure == other._structure and self._versions == other._versions and self._sums == other._sums


def _sums_of(factors: list[Tensor], frozen: list[Tensor], model: object) -> ContentSums:
    """Those of the model where they read these very tensors, whose memory they hold: no address is another's."""
    if model is None or not all(one.is_contiguous() for one in factors):
        return _made(factors, frozen)  # it reads copies of what is not contiguous
    places: list[tuple[object, ...]] = [(len(factors),)]  # of the others a piece is looked at
    places += [(one.data_ptr(), one.numel(), one.dtype, one.device) for some in (factors, frozen) for one in some]
    known = _sums_by_model.get(model)
    if known is None or known[0] != places:
        known = _sums_by_model[model] = places, _made(factors, frozen)
    return known[1]


def _made(factors: list[Tensor], frozen: list[Tensor]) -> ContentSums:
    return ContentSums([*factors, *map(spot_of, frozen)])


def forget(model: object) -> None:
    """Let go of what a model's sums are made with: it holds the memory of weights that the model has given up."""
    _sums_by_model.pop(model, None)


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors have none
