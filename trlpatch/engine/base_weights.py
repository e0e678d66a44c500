"""Are the engine's base weights the trainer's?

An adapter is only the policy on top of the base it is trained on. TRL builds its engine from
`model.name_or_path`, and a model whose weights were changed since (a merged earlier adapter, a resized or
re-initialised layer) still bears that name. TRL's own sync repairs this by pushing every weight; a LoRA
request cannot, so it must not be used then.

Where the engine's weights cannot be compared (quantized, or repacked by vLLM's CPU backend), the trainer's are
compared with what they were when the engine was attached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trlpatch.engine import probes
from trlpatch.policy.adapter import LoraView
from trlpatch.policy.change_detection import as_integers

_SAMPLED_LAYERS = 4


@dataclass(frozen=True)
class Weight:
    """What is remembered of one weight matrix."""

    dtype: Any
    shape: tuple[int, ...]
    bits: int
    """The sum of its elements' bits, read as integers."""


def weights_now(base: Any) -> dict[str, Weight]:
    """Every weight matrix of the model by path, without adapters; not those with an adapter merged into them."""
    import torch

    found: dict[str, Any] = {}
    for path, module in base.named_modules():
        weight = module._parameters.get("weight")
        parent = base.get_submodule(path.rpartition(".")[0])
        if weight is None or weight.dim() != 2 or ".lora_" in path or getattr(parent, "merged", False):
            continue
        if weight.device.type != "meta" and weight.numel() and not hasattr(weight, "full_tensor"):
            found[path.removesuffix(".base_layer")] = weight.detach()
    with torch.no_grad():
        sums = [as_integers(weight).sum(dtype=torch.int64) for weight in found.values()]
        bits = torch.stack([one.cpu() for one in sums]).tolist() if sums else []
    return {
        path: Weight(weight.dtype, tuple(weight.shape), number)
        for (path, weight), number in zip(found.items(), bits, strict=True)
    }


def changed_since(before: dict[str, Weight] | None, view: LoraView) -> str | None:
    """The first adapted base weight that is not what it was `before` (None: nothing is known) is the reason.

    An earlier adapter was merged into it: by the user, or by TRL (GRPO and RLOO 0.22-0.26 and OnlineDPO below 0.27 do
    that when they get a PEFT model and a `peft_config`). Weights of another dtype or shape than before are passed
    over.
    """
    if before is None:
        return None
    now = weights_now(view.base)
    for path, _ in view.layers:
        old, new = before.get(path), now.get(path)
        if old is None or new is None or (old.dtype, old.shape) != (new.dtype, new.shape):
            continue
        if old.bits != new.bits:
            return f"the base weight of {path!r} is not the one that the engine was attached with"
    return None


def base_mismatch(view: LoraView, engine: Any) -> str | None:
    """Compare some adapted layers' base weights; the first one that differs is the reason, None when none
    differs.

    Only what can be compared is: full-precision weights of the same size in this process. Quantized,
    tensor-parallel and repacked weights (vLLM's CPU backend) are passed over.
    """
    module = probes.engine_module(engine)
    manager = getattr(probes.worker_lora_manager(engine), "_adapter_manager", None)
    if module is None or manager is None:
        return None
    inside = {name.replace(".base_layer.", "."): weight for name, weight in module.named_parameters()}
    trained = {path: layer for path, layer in view.layers if hasattr(layer, "lora_A") and not layer.merged}
    compared: set[str] = set()
    for path in _spread(list(trained)):
        name, members = path, [path]
        if f"{path}.weight" not in inside:
            packed = next((item for item in manager.packed_modules.items() if path in item[1]), None)
            if packed is None:
                continue
            name, members = packed[0], list(packed[1])
        weight = inside.get(f"{name}.weight")
        if name in compared or weight is None:
            continue
        compared.add(name)
        if _differs(weight, [_weight(view, member) for member in members]):
            return f"the engine's base weights are not the trainer's: {name!r} differs from {', '.join(members)}"
    return None


def _spread(paths: list[str]) -> list[str]:
    """All adapted modules of the first and the last few layers: a handful, from both ends."""
    return paths if len(paths) <= 8 * _SAMPLED_LAYERS else paths[: 4 * _SAMPLED_LAYERS] + paths[-4 * _SAMPLED_LAYERS :]


def _weight(view: LoraView, path: str) -> Any:
    try:
        module = view.base.get_submodule(path)
    except AttributeError:
        return None
    get_base_layer = getattr(module, "get_base_layer", None)
    return getattr(get_base_layer() if callable(get_base_layer) else module, "weight", None)


def _differs(inside: Any, trained: list[Any]) -> bool:
    import torch

    exact = {torch.float32, torch.bfloat16, torch.float16}
    if inside.dtype not in exact or any(weight is None or weight.dtype not in exact for weight in trained):
        return False
    with torch.no_grad():
        if sum(weight.numel() for weight in trained) != inside.numel() or inside.dim() != 2:
            return False
        weights = [weight.detach().to(device=inside.device, dtype=inside.dtype) for weight in trained]
        if any(weight.shape[1:] != inside.shape[1:] for weight in weights):
            return False
        whole = torch.cat(weights, dim=0)
        if torch.equal(whole, inside) or _same_values(whole, inside):
            return False
        if all(weight.dtype in (inside.dtype, torch.float32) for weight in trained):
            return True
        # float16 against bfloat16: each rounded the checkpoint its own way, by at most 2**-8 of a value.
        error = torch.linalg.vector_norm((whole - inside).float())
        return bool(error > 2**-8 * torch.linalg.vector_norm(whole.float()))


def _same_values(one: Any, other: Any) -> bool:
    """The same numbers in another order? (vLLM permutes some fused weights.)"""
    import torch

    a, b = one.to(torch.float64), other.to(torch.float64)
    scale = torch.linalg.vector_norm(a)
    norms = (scale - torch.linalg.vector_norm(b)).abs() <= 1e-12 * scale
    sums = (a.sum() - b.sum()).abs() <= 1e-9 * scale
    return bool(norms & sums)
