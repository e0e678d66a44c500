"""Which layers are recomputed, on a device whose memory is made up; what they compute is the same either way."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers.modeling_layers")

from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from trlpatch.policy.checkpointing import (  # noqa: E402
    GIB,
    Memory,
    auto_checkpointing,
    checkpointable_layers,
    cuda_memory,
    describe,
    set_auto_checkpointing,
)

pytestmark = pytest.mark.torch

LAYERS = 6
A_LAYER = GIB // 64
"""Bytes that a layer's activations take for one token, on the device made up here."""


class Device:
    """Memory of which every layer that keeps its activations takes some; 2 GiB a token is what the rest takes."""

    def __init__(self, free: float) -> None:
        self.free = int(free * GIB)
        self.retries = 0
        self.tokens = 8
        self.reads = 0

    def __call__(self) -> Memory:
        self.reads += 1
        # The probe reads before and after its layer: only there does what is allocated grow.
        allocated = 10 * GIB + (A_LAYER * self.tokens if self.reads == 3 else 0)
        peak = 10 * GIB + A_LAYER * self.tokens + GIB
        return Memory(allocated, self.free, peak, self.retries)


def model() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    made = Qwen2ForCausalLM(config).train()
    enable(made)
    return made


def enable(made: Any) -> None:
    name = "activation" if hasattr(made, "activation_checkpointing_enable") else "gradient"
    getattr(made, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})


def disable(made: Any) -> None:
    name = "activation" if hasattr(made, "activation_checkpointing_disable") else "gradient"
    getattr(made, f"{name}_checkpointing_disable")()


def step(made: Any, tokens: int = 8) -> tuple[Any, dict[str, Any], int]:
    """(loss, gradients, layers that were computed a second time in the backward pass)."""
    computed: list[int] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda *_, at=at: computed.append(at))
        for at, layer in enumerate(checkpointable_layers(made))
    ]
    ids = torch.arange(tokens)[None] % 64
    loss = made(input_ids=ids, labels=ids).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: parameter.grad.clone() for name, parameter in made.named_parameters()}
    made.zero_grad()
    return loss.detach(), gradients, len(computed) - LAYERS


def test_losses_and_gradients_are_those_of_full_checkpointing() -> None:
    plain, chosen = model(), model()
    set_auto_checkpointing(chosen, on=True, memory=Device(free=100))
    recomputed = []
    for _ in range(3):
        expected, found = step(plain), step(chosen)
        assert torch.equal(expected[0], found[0])
        assert all(torch.equal(expected[1][name], found[1][name]) for name in expected[1])
        assert expected[2] == LAYERS
        recomputed.append(found[2])
    assert recomputed == [LAYERS - 1, 0, 0], "the first step measures with one layer, then all fit"


def test_as_many_layers_are_recomputed_as_memory_demands() -> None:
    # 8 tokens: 1/8 GiB a layer; of 2.6 GiB the rest takes 1 and the margin 1, so that four layers fit into 0.6.
    made, device = model(), Device(free=2.6)
    set_auto_checkpointing(made, on=True, memory=device)
    assert [step(made)[2] for _ in range(2)] == [LAYERS - 1, LAYERS - 4]
    chooser = auto_checkpointing(made)
    assert chosen(chooser) == f"{LAYERS - 4} of {LAYERS} layers at 8 tokens"
    assert f"Qwen2ForCausalLM: {chooser.description}" in describe()
    # 12 tokens: 3/16 GiB a layer, and the rest takes 1.5 GiB.
    assert step(made, 12)[2] == LAYERS
    device.free = 3 * GIB
    assert step(made, 12)[2] == LAYERS - 2


def chosen(chooser: Any) -> str:
    return str(chooser.description).partition(" (")[0]


def test_memory_that_the_engine_needs_back_is_left() -> None:
    made = model()
    set_auto_checkpointing(made, on=True, memory=Device(free=2.6), reserved=lambda: GIB)
    assert [step(made)[2] for _ in range(2)] == [LAYERS - 1, LAYERS]


def test_where_torch_had_to_give_its_cache_back_fewer_layers_are_kept() -> None:
    made, device = model(), Device(free=2.6)
    set_auto_checkpointing(made, on=True, memory=device)
    kept = []
    for _ in range(4):
        kept.append(LAYERS - step(made)[2])
        device.retries += 1
    assert kept == [1, 4, 3, 2]


def test_the_owner_switches_it_off_and_on_around_other_passes() -> None:
    made = model()
    set_auto_checkpointing(made, on=True, memory=Device(free=100))
    step(made)
    assert step(made)[2] == 0
    disable(made)
    with torch.no_grad():
        made(input_ids=torch.arange(8)[None])
    assert step(made)[2] == 0, "it is off: nothing is recomputed"
    assert not any(layer.gradient_checkpointing for layer in checkpointable_layers(made))
    enable(made)
    assert made.is_gradient_checkpointing
    assert step(made)[2] == 0
    assert made.is_gradient_checkpointing, "TRL asks this, and switches it back on only if it was"


def test_switched_off_all_layers_are_recomputed_again() -> None:
    made = model()
    set_auto_checkpointing(made, on=True, memory=Device(free=100))
    step(made)
    step(made)
    set_auto_checkpointing(made, on=False)
    assert auto_checkpointing(made) is None
    assert step(made)[2] == LAYERS


def test_switched_off_after_its_owner_switched_checkpointing_off() -> None:
    made = model()
    set_auto_checkpointing(made, on=True, memory=Device(free=100))
    step(made)
    step(made)
    disable(made)
    set_auto_checkpointing(made, on=False)
    assert not any(layer.gradient_checkpointing for layer in checkpointable_layers(made))


def test_a_failed_forward_leaves_no_second_measurement() -> None:
    made = model()
    set_auto_checkpointing(made, on=True, memory=Device(free=100))
    last = checkpointable_layers(made)[-1]
    failing = last.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(made)
    failing.remove()
    step(made)
    assert not last._forward_pre_hooks
    assert not last._forward_hooks
    set_auto_checkpointing(made, on=False)
    assert not made._forward_pre_hooks


def test_other_passes_and_devices_are_left_alone() -> None:
    made, device = model(), Device(free=100)
    set_auto_checkpointing(made, on=True, memory=device)
    with torch.no_grad():
        made(input_ids=torch.arange(8)[None])
    made.eval()
    made(input_ids=torch.arange(8)[None])
    assert device.reads == 0
    if not torch.cuda.is_available():
        assert cuda_memory() is None
    set_auto_checkpointing(made, on=True, memory=lambda: None)
    made.train()
    assert step(made)[2] == LAYERS
