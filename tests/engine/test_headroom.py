"""Whether a phase held an optimizer step is read off real parameters."""

from __future__ import annotations

from typing import Any

import pytest

from trlpatch.engine.memory import device
from trlpatch.engine.memory.device import GIB
from trlpatch.engine.memory.headroom import HeadroomMonitor

pytestmark = pytest.mark.cpu


@pytest.fixture
def policy() -> Any:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[0].requires_grad_(False)
    return model


def room_after(policy: Any, step: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(device, "free_bytes", lambda where=None: 50 * GIB)
    monkeypatch.setattr(device, "reserved_bytes", lambda where=None: (5 * GIB, 5 * GIB))
    room = HeadroomMonitor()
    room.begin(weights=4 * GIB, weights_unmapped=True, model=policy)
    step()
    room.end()
    return room.suffices


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_the_optimizer_that_trainers_use_counts(
    policy: Any, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5, fused=fused)

    def step() -> None:
        policy(torch.ones(2, 8)).sum().backward()
        optimizer.step()

    assert room_after(policy, step, monkeypatch)


def test_forward_and_backward_alone_do_not_count(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert not room_after(policy, lambda: policy(torch.ones(2, 8)).sum().backward(), monkeypatch)


def test_frozen_weights_do_not_count(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def step() -> None:
        with torch.no_grad():
            policy[0].weight.add_(1.0)

    assert not room_after(policy, step, monkeypatch)
