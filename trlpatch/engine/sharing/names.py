"""Map parameter names: where a transformers model's are inside vLLM's, by the rules of vLLM's own loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trlpatch.engine import probes
from trlpatch.errors import CannotShare

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter


@dataclass(frozen=True)
class ParameterSlot:
    """A parameter of vLLM's model and the module that has it."""

    owner: Module
    parameter: Parameter


def held_parameters(module: Module) -> Iterator[tuple[str, ParameterSlot]]:
    """(name, parameter) of vLLM's model, shared ones under each of their names, as if LoRA had wrapped nothing.

    vLLM puts a layer that it can adapt into a wrapper, as the wrapper's `base_layer`.
    """
    for path, owner in module.named_modules(remove_duplicate=False):
        plain_path = ".".join(part for part in path.split(".") if part != "base_layer")
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                yield f"{plain_path}.{leaf}".lstrip("."), ParameterSlot(owner, parameter)


def plain(parameter: Parameter) -> Tensor:
    """The same storage as a plain tensor: neither vLLM's Parameter subclass nor part of a graph."""
    import torch

    return parameter.detach().as_subclass(torch.Tensor)


class EngineNames:
    """The parameters of one vLLM model, found by transformers' names."""

    def __init__(self, module: Module) -> None:
        self._model = type(module).__name__
        self._held = dict(held_parameters(module))
        self._packed = dict(getattr(module, "packed_modules_mapping", None) or {})
        self._mapper = probes.rename_mapper(module)

    def view(self, name: str, shape: Sequence[int]) -> Tensor:
        """The part of vLLM's storage that is transformers' parameter `name`: a plain tensor of `shape`.

        Raises:
            CannotShare: vLLM has no such parameter, or has it in another form.
        """
        inside = self._renamed(name)
        held = self._held.get(inside)
        if held is not None:
            return self._whole(name, held, tuple(shape))
        path, _, leaf = inside.rpartition(".")
        parent, _, module = path.rpartition(".")
        for packed, members in self._packed.items():
            held = self._held.get(f"{parent}.{packed}.{leaf}".lstrip("."))
            if held is not None and module in members:
                return self._rows(name, held, list(members).index(module), len(members), tuple(shape))
        raise CannotShare(f"the engine's {self._model} has no parameter for {name!r} (looked for {inside!r})")

    def _renamed(self, name: str) -> str:
        found: list[str] = [name] if self._mapper is None else self._mapper.apply_list([name])
        if len(found) != 1:
            raise CannotShare(f"the engine's {self._model} does not load {name!r}")
        return found[0]

    def _whole(self, name: str, held: ParameterSlot, shape: tuple[int, ...]) -> Tensor:
        tensor = plain(held.parameter)
        # Vocabularies are padded to a multiple of 64, up to 0.11.2 with LoRA's own tokens; the real rows are first.
        if tensor.dim() == len(shape) and getattr(held.owner, "org_vocab_size", None) == shape[0] < tensor.shape[0]:
            tensor = tensor[: shape[0]]
        return self._checked(name, tensor, shape)

    def _rows(self, name: str, held: ParameterSlot, index: int, count: int, shape: tuple[int, ...]) -> Tensor:
        tensor, sizes = plain(held.parameter), list(getattr(held.owner, "output_sizes", ()))
        if len(sizes) != count or tensor.dim() == 0 or sum(sizes) != tensor.shape[0]:
            raise CannotShare(
                f"{name!r} is packed in the engine's {type(held.owner).__name__} of shape {list(tensor.shape)}, not "
                f"as {count} runs of rows ({sizes})" + _REPACKED * (tensor.numel() == 0)
            )
        return self._checked(name, tensor.narrow(0, sum(sizes[:index]), sizes[index]), shape)

    @staticmethod
    def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise CannotShare(
                f"{name!r} is {list(tensor.shape)} in the engine and {list(shape)} in transformers"
                + _REPACKED * (tensor.numel() == 0)
            )
        return tensor


_REPACKED = ": vLLM has repacked it for its own kernels, as its CPU backend does with every linear layer"
