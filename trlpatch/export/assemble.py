"""Put base tensors and changes together: every exported tensor once, ties kept where they still hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trlpatch.export.base import BaseTensor, live_tensor
from trlpatch.export.changes import Site
from trlpatch.export.names import checkpoint_names
from trlpatch.export.source import ExportTensor

if TYPE_CHECKING:
    import torch

_WIDE = 4
"""Bytes of an element that a 16-bit checkpoint stores in float32 on purpose."""


@dataclass(frozen=True)
class Assembly:
    """The tensors of an export."""

    tensors: tuple[ExportTensor, ...]
    changes: tuple[Site, ...] = ()
    untied: bool = False
    """Parameters that the base ties are not equal any more."""
    notes: tuple[str, ...] = ()
    base: Mapping[str, BaseTensor] = field(default_factory=dict)
    """Every base tensor by its name in the model, tied ones under each."""

    @classmethod
    def of_files(cls, files: Mapping[str, BaseTensor]) -> Assembly:
        """A model without an adapter, as its files have it."""
        wide = _wide(files)
        return cls(
            tuple(ExportTensor(name, base, keep_dtype=name in wide) for name, base in files.items()), base=files
        )

    def renamed(self, model: Any) -> Assembly:
        """With the names of a checkpoint in place of a live model's."""
        names = checkpoint_names(model, {one.name: one.shape for one in self.tensors})
        tensors: list[ExportTensor] = []
        for one in self.tensors:
            found = names[one.name]
            if isinstance(found, str):
                tensors.append(replace(one, name=found))
            else:
                tensors += [replace(one, name=part.name, part=part) for part in found]
        return replace(self, tensors=tuple(tensors))


def assemble(
    base: Mapping[str, BaseTensor],
    changes: Sequence[Site],
    *,
    groups: Mapping[str, tuple[str, ...]] | None,
    replaced: Mapping[str, BaseTensor],
    embeddings: tuple[str, str] | None,
) -> Assembly:
    """Every tensor once.

    Args:
        base: base tensors by name; of files (which have tied ones once) or of a live model (under each name).
        changes: what the adapter changes.
        groups: for files: name of a tied parameter -> all its names.
        replaced: base tensors that come from elsewhere than `base`.
        embeddings: for a live model whose config ties them: the names of its input and output embeddings.
    """
    found = {**base, **replaced}
    for names in dict.fromkeys((groups or {}).values()):
        present = next((name for name in names if name in replaced), None)
        present = present or next((name for name in names if name in found), None)
        if present is not None:
            found |= dict.fromkeys(names, found[present])
    by_name = {f"{site.path}.{leaf}".lstrip("."): (site, leaf) for site in changes for leaf in site.leaves}
    wide = _wide(base) if groups is not None else set()
    kept: dict[object, str] = {}
    tensors: dict[str, ExportTensor] = {}
    keys: dict[str, object] = {}
    for name in found:
        site, leaf = by_name.get(name, (None, ""))
        key = keys[name] = (
            None if site is not None and site.kind == "replaced" else found[name].key,
            site and site.key,
        )
        if key in kept:
            continue
        kept[key] = name
        siblings = {}
        if site is not None and site.kind != "replaced":
            siblings = {one: found[f"{site.path}.{one}"] for one in site.leaves}
        one = found[name]
        if site is not None and site.kind == "replaced":
            own = live_tensor(name, site.replacement(leaf))
            if own.shape != one.shape:  # resized after loading
                one = found[name] = replace(own, dtype=one.dtype, key=own.key)
        tensors[name] = ExportTensor(name, one, site, leaf, siblings, keep_dtype=name in wide and site is None)
    _tie_equal(groups or {}, tensors, keys)
    split = [names for names in dict.fromkeys((groups or {}).values()) if len({keys[one] for one in names}) > 1]
    if (
        embeddings is not None
        and all(name in keys for name in embeddings)
        and keys[embeddings[0]] != keys[embeddings[1]]
    ):
        split.append(embeddings)
    notes = tuple(
        f"{' and '.join(names)}, which the base model ties, differ with the adapter: written apart, with "
        "tie_word_embeddings=False in the config"
        for names in split
    )
    return Assembly(tuple(tensors.values()), tuple(changes), bool(split), notes, found)


def _tie_equal(
    groups: Mapping[str, tuple[str, ...]], tensors: dict[str, ExportTensor], keys: dict[str, object]
) -> None:
    """Drop the second of tied parameters where modules_to_save holds equal ones for both (ensure_weight_tying)."""
    import torch

    def in_full(one: ExportTensor | None) -> bool:
        return one is not None and one.site is not None and one.site.kind == "replaced"

    for first, *others in dict.fromkeys(groups.values()):
        for name in others:
            pair = tensors.get(first), tensors.get(name)
            if (
                pair[0] is None
                or pair[1] is None
                or {one.site and one.site.kind for one in pair if one} != {"replaced"}
            ):
                continue
            if torch.equal(pair[0].read(), pair[1].read()):
                del tensors[name]
                keys[name] = keys[first]


def _wide(tensors: Mapping[str, BaseTensor]) -> set[str]:
    """Names of the float32 tensors of a checkpoint that is in 16 bits otherwise."""
    counts: dict[torch.dtype, int] = {}
    for one in tensors.values():
        counts[one.dtype] = counts.get(one.dtype, 0) + one.elements
    if not counts or max(counts, key=counts.__getitem__).itemsize >= _WIDE:
        return set()
    return {name for name, one in tensors.items() if one.dtype.is_floating_point and one.dtype.itemsize >= _WIDE}
