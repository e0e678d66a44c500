"""Names of a live model's parameters in a checkpoint: transformers renames and fuses some while it loads them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Split:
    """A fused parameter: transformers' own conversion takes it apart into the tensors of the checkpoint."""

    convert: Callable[[Tensor], dict[str, Tensor]]
    names: frozenset[str]
    _waiting: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One of the tensors that a fused parameter becomes."""

    split: Split
    name: str
    shape: tuple[int, ...]

    def of(self, read: Callable[[], Tensor], purpose: str) -> Tensor:
        """The part of what is read; that is read once for all of them, and for each purpose."""
        waiting = self.split._waiting.setdefault(purpose, {})
        if self.name not in waiting:
            waiting.update(self.split.convert(read()))
        return waiting.pop(self.name).contiguous()


def checkpoint_names(model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, str | list[Part]]:
    """Name in the live model -> name in a checkpoint, or the parts that it has there. `shapes` are by live name.

    Raises:
        CannotExport: transformers cannot convert them one by one.
    """
    convert = _conversion(model)
    if convert is None:
        return dict(zip(shapes, shapes, strict=True))
    import torch

    found: dict[str, str | list[Part]] = {}
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if set(convert(dict(empty))) == set(shapes):
        return dict(zip(shapes, shapes, strict=True))
    for name, tensor in empty.items():
        try:
            parts = convert({name: tensor})
        except Exception as error:
            raise CannotExport(
                f"exporting {type(model).__name__}: transformers cannot convert {name!r} back to its checkpoint's "
                f"names: {error}; save the model with save_pretrained and export the directory"
            ) from error
        if len(parts) == 1 and next(iter(parts.values())).shape == tensor.shape:
            found[name] = next(iter(parts))
            continue
        split = Split(_bound(convert, name), frozenset(parts))
        found[name] = [Part(split, one, tuple(part.shape)) for one, part in parts.items()]
    return found


def _bound(convert: Callable[[dict[str, Any]], dict[str, Any]], name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda tensor: convert({name: tensor})


def _conversion(model: Any) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        return None if not mapping else lambda found: {_reverted(name, mapping): one for name, one in found.items()}
    return lambda found: dict(revert_weight_conversion(model, found))


def _reverted(name: str, mapping: dict[str, str]) -> str:
    """As transformers 4's save_pretrained names it: the patterns of the loader, read backwards."""
    for old, new in mapping.items():
        target = re.sub(r"\(.*\)", "", old.lstrip("^"))
        name, count = re.subn(new, target, name)
        if count:
            break
    return name
