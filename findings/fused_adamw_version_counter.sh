#!/usr/bin/env bash
# A fused optimizer step changes parameters without moving their version counters
#
# One would guess: an optimizer step writes in place, so `parameter._version` grows with each step, and a backward pass
#   through a graph that saved the parameter before the step raises "modified by an inplace operation".
# What happens: with fused=True (AdamW, Adam, SGD, Adagrad) the counter stays where it is. The stale backward pass runs
#   and uses the new value of the parameter with the old graph: the gradient is wrong, silently. With foreach or the
#   plain loop it raises. Whoever caches something by `_version` (a merged weight, a copy elsewhere) keeps a stale one.
# Source: torch/optim/adamw.py and aten's _fused_adamw_, which takes mutable TensorLists and has no derivative.
# Versions: torch 2.13.0 on a CPU. 2026-11-27.
# Seen:
#   torch 2.13.0+cpu
#   AdamW: versions that a step adds: {'fused': 0, 'foreach': 2, 'loop': 2}
#   Adam: versions that a step adds: {'fused': 0, 'foreach': 1, 'loop': 1}
#   SGD: versions that a step adds: {'fused': 0, 'foreach': 1, 'loop': 1}
#   Adagrad: versions that a step adds: {'fused': 0, 'foreach': 1, 'loop': 1}
#   gradient through the graph of before the step, right is 2.0, None is refused: {'fused': 1.0000001192092896, 'foreach': None, 'loop': None}
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0

"$work/venv/bin/python" -W ignore - <<'PY'
import torch

KINDS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}


def moved(optimizer, kind):
    """Take one step; return how far the counter and the value moved."""
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    before = parameter._version
    optimizer([parameter], lr=0.1, **KINDS[kind]).step()
    assert bool((parameter < 1).all())
    return parameter._version - before


def stale_gradient(kind):
    """Return d(w * x)/dx, taken after a step on w from 2 to 1: 2 is right; None where autograd refuses."""
    weight, x = torch.nn.Parameter(torch.tensor([2.0])), torch.tensor([3.0], requires_grad=True)
    product = (weight * x).sum()
    weight.grad = torch.ones(1)
    torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0, **KINDS[kind]).step()
    try:
        product.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None
    return x.grad.item()


print("torch", torch.__version__)
counts = {}
for name in ("AdamW", "Adam", "SGD", "Adagrad"):
    counts[name] = {kind: moved(getattr(torch.optim, name), kind) for kind in KINDS}
    print(f"{name}: versions that a step adds: {counts[name]}")
gradients = {kind: stale_gradient(kind) for kind in KINDS}
print("gradient through the graph of before the step, right is 2.0, None is refused:", gradients)
assert all(kinds["fused"] == 0 and kinds["foreach"] > 0 and kinds["loop"] > 0 for kinds in counts.values())
assert abs(gradients["fused"] - 1.0) < 1e-3 and gradients["foreach"] is gradients["loop"] is None
PY
