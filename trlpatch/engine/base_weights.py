"""Compare base weights: are the engine's those that the adapter is trained on?

An adapter is only the policy on top of the base it is trained on. TRL builds its engine from
`model.name_or_path`, and a model whose weights were changed since (a merged earlier adapter, a resized or
re-initialised layer) still bears that name. TRL's own sync repairs this by pushing every weight; a LoRA
request cannot, so it must not be used then.

Where the engine's weights cannot be compared (quantized, or repacked by vLLM's CPU backend), the trainer's are
compared with what they were when the engine was attached: `trlpatch.policy.base_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trlpatch.policy.adapter import LoraView
from trlpatch.policy.sharding import piece_of, shape_of, sharded_by

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_SAMPLED_LAYERS = 4


def base_mismatch(view: LoraView, module: Module, packed_modules: Mapping[str, list[str]]) -> str | None:
    """Compare some adapted layers' base weights; the first one that differs is the reason, None when none does.

    `module` is what the worker runs, `packed_modules` its fused layers and what they are made of. Only what can be
    compared is: full-precision weights of the same size. Quantized, tensor-parallel and repacked weights (vLLM's CPU
    backend) are passed over.
    """
    inside = {name.replace(".base_layer.", "."): weight for name, weight in module.named_parameters()}
    trained = {path: layer for path, layer in view.layers if hasattr(layer, "lora_A") and not layer.merged}
    compared: set[str] = set()
    for path in _spread(list(trained)):
        name, members = path, [path]
        if f"{path}.weight" not in inside:
            packed = next((item for item in packed_modules.items() if path in item[1]), None)
            if packed is None:
                continue
            name, members = packed[0], list(packed[1])
        weight = inside.get(f"{name}.weight")
        if name in compared or weight is None:
            continue
        compared.add(name)
        if differs(weight, [_weight(view, member) for member in members]):
            return f"the engine's base weights are not the trainer's: {name!r} differs from {', '.join(members)}"
    return None


def _spread(paths: list[str]) -> list[str]:
    """All adapted modules of the first and the last few layers: a handful, from both ends."""
    return paths if len(paths) <= 8 * _SAMPLED_LAYERS else paths[: 4 * _SAMPLED_LAYERS] + paths[-4 * _SAMPLED_LAYERS :]


def _weight(view: LoraView, path: str) -> Tensor | None:
    try:
        module = view.base.get_submodule(path)
    except AttributeError:
        return None
    get_base_layer = getattr(module, "get_base_layer", None)
    return getattr(get_base_layer() if callable(get_base_layer) else module, "weight", None)


def differs(inside: Tensor, trained: list[Tensor | None]) -> bool:
    """Are an engine's values others than the trainer's, one above the other, would be after rounding to its dtype?"""
    import torch

    if any(sharded_by(weight) is not None for weight in trained):
        return _pieces_differ(inside, trained)
    exact = {torch.float32, torch.bfloat16, torch.float16}
    known = [weight for weight in trained if weight is not None and weight.dtype in exact]
    if inside.dtype not in exact or len(known) < len(trained):
        return False
    with torch.no_grad():
        if sum(weight.numel() for weight in known) != inside.numel() or inside.dim() not in (1, 2):
            return False
        weights = [weight.detach().to(device=inside.device, dtype=inside.dtype) for weight in known]
        if any(weight.shape[1:] != inside.shape[1:] for weight in weights):
            return False
        whole = torch.cat(weights, dim=0)
        if torch.equal(whole, inside) or _same_values(whole, inside):
            return False
        if all(weight.dtype in (inside.dtype, torch.float32) for weight in known):
            return True
        # float16 against bfloat16: each rounded the checkpoint its own way, by at most 2**-8 of a value.
        error = torch.linalg.vector_norm((whole - inside).float())
        return bool(error > 2**-8 * torch.linalg.vector_norm(whole.float()))


def _pieces_differ(inside: Tensor, trained: list[Tensor | None]) -> bool:
    """Do the parts of sharded weights that are in this process differ? Each process looks at its own."""
    sizes = [0 if weight is None else shape_of(weight).numel() for weight in trained]
    if sum(sizes) != inside.numel():
        return False
    whole = inside.detach().reshape(-1)
    for weight, there in zip(trained, whole.split(sizes), strict=True):
        piece = None if weight is None else piece_of(weight)
        if piece is not None and piece[1].numel() and differs(there[piece[0] :][: piece[1].numel()], [piece[1]]):
            return True
    return False


def _same_values(one: Tensor, other: Tensor) -> bool:
    """The same numbers in another order? (vLLM permutes some fused weights.)"""
    import torch

    a, b = one.to(torch.float64), other.to(torch.float64)
    scale = torch.linalg.vector_norm(a)
    norms = (scale - torch.linalg.vector_norm(b)).abs() <= 1e-12 * scale
    sums = (a.sum() - b.sum()).abs() <= 1e-9 * scale
    return bool(norms & sums)
