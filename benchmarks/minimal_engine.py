"""The least of a `vllm.LLM` that an adapter can be handed over to: LoRA buffers of a Qwen2, laid out as vLLM has them.

It generates nothing. The requests and the objects of an adapter are vLLM's own, its worker's registry is imitated,
so a hand-over does what it does on a real engine, without the minute that one takes to build.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class _Layer:
    """A linear layer with one slot for an adapter, of one slice or of several packed ones."""

    tp_size = 1

    def __init__(self, rank: int, width: int, *outs: int, device: str) -> None:
        import torch

        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        self.lora_a_stacked = tuple(torch.zeros(1, 1, rank, width, **options) for _ in outs)
        self.lora_b_stacked = tuple(torch.zeros(1, 1, out, rank, **options) for out in outs)

    def set_lora(self, lora_a: Any, lora_b: Any) -> None:
        for stacked, given in ((self.lora_a_stacked, lora_a), (self.lora_b_stacked, lora_b)):
            parts = given if isinstance(given, list) else [given]
            for buffer, part in zip(stacked, parts, strict=True):
                buffer.zero_()
                buffer[0, 0, : part.shape[0], : part.shape[1]].copy_(part)


class _Manager:
    """`LRUCacheLoRAModelManager` with one slot."""

    capacity = 2

    def __init__(self, layers: dict[str, _Layer], packed: dict[str, list[str]]) -> None:
        self.modules = layers
        self.packed_modules = packed
        self.model = SimpleNamespace()
        self.lora_index_to_id: list[int | None] = [None]
        self._registered: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._registered)

    def get_adapter(self, lora_id: int) -> Any:
        return self._registered.get(lora_id)

    def remove_adapter(self, lora_id: int) -> None:
        self._registered.pop(lora_id, None)
        self.lora_index_to_id = [None if found == lora_id else found for found in self.lora_index_to_id]

    def add_adapter(self, lora: Any) -> None:
        for name, members in self.packed_modules.items():
            found = [lora.loras.pop(member) for member in members]
            lora.loras[name] = SimpleNamespace(
                lora_a=[one.lora_a for one in found], lora_b=[one.lora_b for one in found]
            )
        self._registered[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> None:
        self.lora_index_to_id[0] = lora_id
        for name, layer in self.modules.items():
            entry = self._registered[lora_id].get_lora(name)
            layer.set_lora(entry.lora_a, entry.lora_b)


class MinimalEngine:
    """For a Qwen2 of a transformers config."""

    def __init__(self, config: Any, rank: int, device: str) -> None:
        import torch

        hidden, inner = config.hidden_size, config.intermediate_size
        keys = hidden // config.num_attention_heads * config.num_key_value_heads
        layers: dict[str, _Layer] = {}
        packed: dict[str, list[str]] = {}
        for index in range(config.num_hidden_layers):
            for fused, members, width, outs in (
                ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), hidden, (hidden, keys, keys)),
                ("self_attn.o_proj", (), hidden, (hidden,)),
                ("mlp.gate_up_proj", ("gate_proj", "up_proj"), hidden, (inner, inner)),
                ("mlp.down_proj", (), inner, (hidden,)),
            ):
                name = f"model.layers.{index}.{fused}"
                layers[name] = _Layer(rank, width, *outs, device=device)
                if members:
                    packed[name] = [f"{name.rpartition('.')[0]}.{member}" for member in members]
        lora_config = SimpleNamespace(
            max_lora_rank=rank,
            lora_dtype=torch.bfloat16,
            fully_sharded_loras=False,
            bias_enabled=False,
            default_mm_loras=None,
        )
        worker = SimpleNamespace(_adapter_manager=_Manager(layers, packed), lora_config=lora_config)
        runner = SimpleNamespace(lora_manager=worker)
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(
                lora_config=lora_config,
                model_config=SimpleNamespace(enable_sleep_mode=False),
                parallel_config=SimpleNamespace(tensor_parallel_size=1),
            ),
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)),
        )

    def generate(self, *_: object, **__: object) -> list[object]:
        """Generate nothing."""
        return []

    def reset_prefix_cache(self) -> bool:
        """There is none."""
        return True
