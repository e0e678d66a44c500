"""Base weights to export, read a tensor and a block of rows at a time: from a checkpoint's files or a live model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport
from trlpatch.policy.adapter import base_of
from trlpatch.policy.base_parameters import WRAPPED

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

CONFIG = "config.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_CONTAINERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP1 and activation checkpointing put around modules."""


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base model, not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]
    """Rows [start, stop) of the first dimension, on the CPU, in `dtype`; only to be read. A scalar has one row."""
    key: object
    """Equal for tied tensors."""

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    def whole(self) -> Tensor:
        """The tensor on the CPU, in `dtype`; only to be read."""
        return self.rows(0, self.shape[0] if self.shape else 1)


class CheckpointFiles:
    """The weights of a checkpoint directory: safetensors, sharded or not, or pytorch_model.bin.

    A file is opened for each block that is read: pages of a mapped file count as memory of the process until the
    mapping goes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = _weight_files(directory)
        if not self._files:
            raise CannotExport(
                f"reading the base weights in {str(directory)!r}: expected model.safetensors, an index of shards or "
                "pytorch_model.bin, found none; give a directory or a model id that has weights with base="
            )

    @cached_property
    def tensors(self) -> dict[str, BaseTensor]:
        """Every tensor by its name in the files."""
        found: dict[str, BaseTensor] = {}
        for path in self._files:
            found |= _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
        return found

    def __getitem__(self, name: str) -> BaseTensor:
        return self.tensors[name]


def has_weights(directory: Path) -> bool:
    """Has it the weights of a whole model?"""
    return bool(_weight_files(directory))


def _weight_files(directory: Path) -> list[Path]:
    for name in _SINGLE:
        index = directory / f"{name}.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(one for one in names if not (directory / one).is_file())
            if missing:
                raise CannotExport(
                    f"reading the base weights in {str(directory)!r}: {index.name} names {missing[0]!r}, which is not "
                    f"there ({len(missing)} of {len(names)} shards are missing); download or copy it again"
                )
            return [directory / one for one in sorted(names)]
        if (directory / name).is_file():
            return [directory / name]
    return []


def _safetensors(path: Path) -> dict[str, BaseTensor]:
    import torch
    from safetensors import SafetensorError, safe_open

    dtypes = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip

    def reader(name: str, shape: tuple[int, ...]) -> Callable[[int, int], Tensor]:
        def rows(start: int, stop: int) -> Tensor:
            with safe_open(str(path), framework="pt") as file:
                if not shape or (start, stop) == (0, shape[0]):
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
                block: Tensor = file.get_slice(name)[start:stop]
                return block

        return rows

    found: dict[str, BaseTensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                view = file.get_slice(name)
                kind, shape = view.get_dtype(), tuple(view.get_shape())
                if kind not in _READABLE:
                    raise CannotExport(
                        f"reading the base weights in {str(path)!r}: {name!r} is stored as {kind}; expected floating "
                        "point of 16 bits or more: give the checkpoint that it was quantized from with base="
                    )
                found[name] = BaseTensor(shape, dtypes[kind], reader(name, shape), (path, name))
    except SafetensorError as error:
        raise CannotExport(f"reading the base weights in {str(path)!r}: {error}; download or copy it again") from error
    return found


def _pickled(path: Path) -> dict[str, BaseTensor]:
    import torch

    def reader(tensor: Tensor) -> Callable[[int, int], Tensor]:
        return lambda start, stop: tensor[start:stop] if tensor.dim() else tensor

    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {
        name: BaseTensor(tuple(one.shape), one.dtype, reader(one), (one.data_ptr(), tuple(one.shape)))
        for name, one in loaded.items()
    }


def live_tensors(model: Any) -> dict[str, BaseTensor]:
    """The parameters and persistent buffers of the transformers model under PEFT, by the names that it has without.

    Nothing that PEFT added is among them; tied ones come under each of their names, with one key. Views of an
    engine's memory are read like any other: rollouts never merge an adapter into them.

    Raises:
        CannotExport: a parameter is sharded, offloaded, or quantized.
    """
    return {path: live_tensor(path, tensor) for path, tensor in walk(base_of(model), "")}


def walk(module: Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """(path, parameter or persistent buffer) below a module, with the paths that it has without PEFT."""
    for name in (*WRAPPED, *_CONTAINERS):
        inner = module._modules.get(name)
        if inner is not None:
            yield from walk(inner, path)
            return
    for leaf, tensor in module._parameters.items():
        if tensor is not None:
            yield f"{path}{leaf}", tensor
    for leaf, buffer in module._buffers.items():
        if buffer is not None and leaf not in module._non_persistent_buffers_set:
            yield f"{path}{leaf}", buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{path}{name}.")


def clean_path(path: str) -> str:
    """The path of a module without what wraps it or one above it."""
    return ".".join(part for part in path.split(".") if part and part not in (*WRAPPED, *_CONTAINERS))


def live_tensor(path: str, tensor: Tensor) -> BaseTensor:
    """A tensor of a live model.

    Raises:
        CannotExport: it is sharded, or holds no data here.
    """
    sharded = "DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") else "FSDP" if hasattr(tensor, "full_tensor") else None
    if sharded:
        raise CannotExport(
            f"exporting the model in training: {path!r} is sharded by {sharded}; expected whole parameters; save a "
            "checkpoint with the trainer, and export its directory: trlpatch export merged CHECKPOINT --out DIR"
        )
    if tensor.device.type == "meta":
        raise CannotExport(
            f"exporting the model in training: {path!r} holds no data in this process (offloaded?); load the model "
            "without a device_map that offloads, or export its checkpoint directory"
        )

    def rows(start: int, stop: int) -> Tensor:
        found = tensor.detach()
        return (found[start:stop] if found.dim() else found).cpu()

    key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tensor.numel() else id(tensor)
    return BaseTensor(tuple(tensor.shape), tensor.dtype, rows, key)
