"""Declare what of vLLM is touched: `vllm.LLM`, its engine, executor, LoRA managers and allocator, as types.

Names and meaning are vLLM's own, 0.8.0 to 0.33.0. What not every release has is asked for with `getattr` where it is
used, and says so there. Nothing here imports vLLM or torch at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from trlpatch.policy.policy_weights import PolicyWeight


class LoraRequest(Protocol):
    """`vllm.lora.request.LoRARequest`: which adapter a request is generated with."""

    lora_name: str
    lora_int_id: int

    @property
    def lora_path(self) -> str:
        """The directory that the adapter is loaded from when it is not registered."""


class EngineCoreClient(Protocol):
    """`vllm.v1.engine.core_client.InprocClient`, and the clients of an engine core in another process."""

    def get_output(self) -> object:
        """Advance the engine core by one step."""


class LLMEngine(Protocol):
    """`vllm.v1.engine.llm_engine.LLMEngine`, behind `LLM.llm_engine`."""

    engine_core: EngineCoreClient

    def collective_rpc(self, method: str | Callable[..., object]) -> list[Any]:
        """Call a method of every worker; one answer a worker."""

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Map what a sleep unmapped."""

    def sleep(self, level: int = 1) -> None:
        """Unmap the KV cache, and (level 1: to the CPU; 2: for good) the weights."""

    def add_lora(self, lora_request: LoraRequest) -> bool:
        """Have every worker load an adapter from its directory."""

    def remove_lora(self, lora_id: int) -> bool:
        """Have every worker drop an adapter."""

    def add_request(self, request_id: str, prompt: object, params: object) -> object:
        """Queue one request."""


class RolloutEngine(Protocol):
    """`vllm.LLM`: what a trainer rolls out on."""

    @property
    def llm_engine(self) -> LLMEngine:
        """The engine behind it."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Complete prompts; a list with one `RequestOutput` each."""

    def sleep(self, level: int = 1) -> None:
        """As `LLMEngine.sleep`."""

    def wake_up(self, tags: list[str] | None = None) -> None:
        """As `LLMEngine.wake_up`."""

    def collective_rpc(self, method: str | Callable[..., object]) -> list[Any]:
        """As `LLMEngine.collective_rpc`."""

    def reset_prefix_cache(self) -> bool | None:
        """Forget cached prefixes; False when blocks are in use, None where the release does not say."""


class Executor(Protocol):
    """`vllm.v1.executor.abstract.Executor`."""

    sleeping_tags: set[str]
    """The pools that are unmapped (0.8.3)."""
    is_sleeping: bool


class LoraLayerWeights(Protocol):
    """`vllm.lora.lora_weights.LoRALayerWeights`: A and B of one module, lists of them for packed modules."""

    lora_a: Tensor | list[Tensor | None]
    lora_b: Tensor | list[Tensor | None]
    input_dim: int
    output_dim: int


class LoraModel(Protocol):
    """`vllm.lora.lora_model.LoRAModel`: one adapter as the registry holds it."""

    id: int
    loras: dict[str, LoraLayerWeights]

    def get_lora(self, module_name: str) -> LoraLayerWeights | None:
        """The weights of one module."""


class AdapterManager(Protocol):
    """`vllm.lora.model_manager.LRUCacheLoRAModelManager`: the registry of adapters, and slots."""

    model: Module
    modules: dict[str, Any]
    """Name -> LoRA layer (`BaseLayerWithLoRA`)."""
    packed_modules: dict[str, list[str]]
    capacity: int
    lora_index_to_id: list[int | None]
    _last_mapping: object

    def __len__(self) -> int: ...

    def get_adapter(self, adapter_id: int) -> LoraModel | None:
        """A registered adapter."""

    def add_adapter(self, adapter: LoraModel) -> bool:
        """Register an adapter."""

    def activate_adapter(self, adapter_id: int) -> bool:
        """Copy a registered adapter into a slot."""

    def remove_adapter(self, adapter_id: int) -> bool:
        """Take an adapter out of its slot and out of the registry."""

    def remove_oldest_adapter(self) -> bool:
        """Make room (LRU managers only)."""


class LoraConfig(Protocol):
    """`vllm.config.LoRAConfig`."""

    max_lora_rank: int
    lora_dtype: Any
    fully_sharded_loras: bool


class LoraManager(Protocol):
    """`vllm.lora.worker_manager.WorkerLoRAManager` of one worker, as `model_runner.lora_manager`."""

    _adapter_manager: AdapterManager
    lora_config: LoraConfig

    def list_adapters(self) -> set[int]:
        """The ids of the registered adapters."""


class WeightsMapper(Protocol):
    """`vllm.model_executor.models.utils.WeightsMapper`: from a checkpoint's names to vLLM's."""

    def apply_list(self, values: list[str]) -> list[str]:
        """Rename; names that are not loaded are left out."""


class AllocationData(Protocol):
    """`vllm.device_allocator.cumem.AllocationData`: one allocation of a pool."""

    handle: Sequence[int]
    """(device, size in bytes, address, the driver's handle)."""
    tag: str


class CuMemAllocator(Protocol):
    """`vllm.device_allocator.cumem.CuMemAllocator.instance`."""

    pointer_to_data: Mapping[int, AllocationData]
    allocator_and_pools: MutableMapping[str, Any]
    """Tag -> (memory pool, allocator)."""

    def get_current_usage(self) -> int:
        """The bytes of all pools."""

    def discard(self, tags: Collection[str]) -> None:
        """Unmap pools without a copy (0.28)."""


class WeightTransfer(Protocol):
    """Sends whole policies to engines whose weights cannot be written from this process."""

    @property
    def description(self) -> str:
        """For `trlpatch.status()`."""

    def send(self, weights: list[PolicyWeight]) -> str | None:
        """Have every engine sample with a policy; why not, where that cannot be and nothing was changed.

        Raises:
            EngineLost: an engine was lost by it.
        """

    def start(self, weights: list[PolicyWeight]) -> str | None:
        """Begin to, beside what the caller does next; the next `send` of the same waits for it.

        The tensors must not be written meanwhile.
        """
