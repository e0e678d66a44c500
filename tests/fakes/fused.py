"""A stand-in for vLLM's model: the same numbers under vLLM's names, fused, padded and wrapped as vLLM does it.

Its real counterpart is tests/cpu/test_sharing.py. This one also runs where no vLLM is, on any transformers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from trlpatch.engine.sharing.names import EngineNames
from trlpatch.engine.weights_in_place import merge
from trlpatch.policy.policy_weights import policy_weights

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class VLLMParameterStub(torch.nn.Parameter):
    """vLLM's parameters are a subclass of torch's."""


class FusedModelStub(torch.nn.Module):
    """Takes the weights of a transformers model; `lora` puts linear layers into wrappers."""

    def __init__(self, model: Any, *, lora: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.packed_modules_mapping = PACKED
        rows: dict[str, list[Any]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if tied and name == "lm_head.weight":
                continue
            path, _, leaf = name.rpartition(".")
            parent, _, last = path.rpartition(".")
            packed = next((fused for fused, members in PACKED.items() if last in members), last)
            rows.setdefault(f"{parent}.{packed}.{leaf}".lstrip("."), []).append(parameter.detach())
        for name, parts in rows.items():
            self._put(name, parts, lora=lora)

    def _put(self, name: str, parts: list[Any], *, lora: bool) -> None:
        *path, leaf = name.split(".")
        owner: torch.nn.Module = self
        for part in path + (["base_layer"] if lora and path[-1].endswith("proj") else []):
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        whole = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        if path[-1] in ("embed_tokens", "lm_head"):
            owner.org_vocab_size = whole.shape[0]
            padding = -whole.shape[0] % 64
            whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
        if len(parts) > 1:
            owner.output_sizes = [part.shape[0] for part in parts]
        owner.register_parameter(leaf, VLLMParameterStub(whole))


class LoadingStub(FusedModelStub):
    """With vLLM's loader: rows of packed layers, the first rows of padded vocabularies."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.loaded: list[str] = []

    def load_weights(self, weights: Any) -> None:
        names = EngineNames(self)
        for name, tensor in weights:
            self.loaded.append(name)
            names.view(name, tensor.shape).copy_(tensor)


class EngineStub:
    """A `vllm.LLM` that is only looked at."""

    def __init__(self, llm_engine: Any) -> None:
        self.llm_engine = llm_engine

    def generate(self) -> None:
        raise NotImplementedError


def engine_over(module: Any, directory: str = "", **settings: Any) -> Any:
    """As much of an engine as sharing asks, around a module."""
    runner = SimpleNamespace(get_model=lambda: module)
    model_config = SimpleNamespace(**{"model": directory, "revision": None, "quantization": None, **settings})
    config = SimpleNamespace(model_config=model_config, parallel_config=SimpleNamespace(tensor_parallel_size=1))
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
    return EngineStub(SimpleNamespace(vllm_config=config, model_executor=executor))


def idle_engine_over(module: Any) -> Any:
    """As `engine_over`, with what writing weights asks: are there requests, and reset the prefix cache."""
    engine = engine_over(module)
    inner = engine.llm_engine
    inner.add_request = lambda *_, **__: None
    inner.unfinished = False
    inner.has_unfinished_requests = lambda: inner.unfinished
    engine.resets = 0

    def reset() -> bool:
        engine.resets += 1
        return True

    engine.reset_prefix_cache = reset
    engine.sleep = inner.sleep = engine.wake_up = inner.wake_up = lambda *_, **__: None
    return engine


@torch.no_grad()
def assert_holds(module: Any, model: Any, **options: Any) -> None:
    """Are these the weights that the model computes with, with its adapters or (`adapters=False`) without?"""
    names = EngineNames(module)
    for one in policy_weights(model, **options):
        right = merge.merged(one, slice(None), torch.device("cpu"))
        target = names.view(one.path, one.base.shape)
        torch.testing.assert_close(target, right.to(target.dtype), msg=one.path)
