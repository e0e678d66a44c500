"""What repaired TRL code asks: how this vLLM and this transformers want something that an older one wanted otherwise.

The patched text is the same whatever is installed beside TRL. What is installed decides here, when TRL asks, and where
it needs no repair it gets exactly what TRL wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any

from trlpatch.engine import probes

_TOKENIZER = "vllm.transformers_utils.tokenizer"


def is_package_available(name: str, return_version: bool = False) -> Any:
    """What stands where TRL below 0.29 imported transformers' `_is_package_available`.

    A bool, or (bool, version) with `return_version`. transformers 5.3 and newer return a tuple in both cases.
    """
    from transformers.utils.import_utils import _is_package_available

    found = _is_package_available(name, return_version=return_version)
    return found[0] if isinstance(found, tuple) and not return_version else found


def vllm_tokenizer() -> Any:
    """vLLM's module `vllm.transformers_utils.tokenizer`; where it is gone, an object that takes assignments."""
    try:
        return importlib.import_module(_TOKENIZER)
    except ModuleNotFoundError as error:
        if error.name != _TOKENIZER:
            raise
        return SimpleNamespace()


def http_adapter() -> Any:
    """`requests.adapters.HTTPAdapter`; None without `requests`, which TRL's client reports when it is built."""
    try:
        return importlib.import_module("requests.adapters").HTTPAdapter
    except ModuleNotFoundError as error:
        if error.name != "requests":
            raise
        return None


def weight_sender() -> tuple[Any, Any]:
    """vLLM's `NCCLTrainerSendWeightsArgs`, None where it is gone (0.28), and `NCCLWeightTransferEngine`.

    TRL's client needs the first to push weights to a server.
    """
    module = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
    return getattr(module, "NCCLTrainerSendWeightsArgs", None), module.NCCLWeightTransferEngine


def guided_decoding_params() -> Callable[..., Any]:
    """vLLM's `GuidedDecodingParams`; where it is gone, a function of the same arguments for what took its place."""
    import vllm.sampling_params

    own: Callable[..., Any] | None = getattr(vllm.sampling_params, "GuidedDecodingParams", None)
    return _structured_outputs if own is None else own


def _structured_outputs(*, regex: str, backend: str | None = None) -> Any:
    # The backend is a setting of the engine now: StructuredOutputsParams has none.
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(regex=regex)


def guided_decoding_field() -> str:
    """The field of `SamplingParams` that takes what `guided_decoding_params()` makes."""
    return "structured_outputs" if guided_decoding_params() is _structured_outputs else "guided_decoding"


def warnings_issued(model: Any) -> MutableMapping[str, bool]:
    """The model's own dictionary of warnings; one that nobody reads where transformers (5.1 and newer) has none."""
    own: MutableMapping[str, bool] | None = getattr(model, "warnings_issued", None)
    return {} if own is None else own


def use_cache(options: Mapping[str, Any]) -> bool | None:
    """The `use_cache` of a `model_init_kwargs`, where it has none what transformers takes for that.

    None on transformers 4. Configs of version 5 are dataclasses that check their fields, this one for a bool: True,
    their default.
    """
    from transformers import PretrainedConfig

    value: bool | None = options.get("use_cache", True if dataclasses.is_dataclass(PretrainedConfig) else None)
    return value


def seed_worker(trainer: Any, function: Callable[..., None]) -> Callable[..., None]:
    """`function` as a dataloader calls it, with the worker's number only.

    transformers 4.52 and newer also want the number of workers and the rank.
    """
    if "num_workers" not in inspect.signature(function).parameters:
        return function
    return functools.partial(
        function, num_workers=trainer.args.dataloader_num_workers, rank=trainer.args.process_index
    )


def given(values: dict[str, Any] | None) -> dict[str, Any]:
    """The values of an option whose default is None."""
    return {} if values is None else values


def use_apex(trainer: Any) -> bool:
    """`trainer.use_apex`; transformers 5 has neither the attribute nor apex."""
    return bool(getattr(trainer, "use_apex", False))


def nested_gather(trainer: Any) -> Callable[[Any], Any]:
    """`trainer._nested_gather`; from transformers 5.2 on the function that it called."""
    method = getattr(trainer, "_nested_gather", None)
    if method is not None:
        gather: Callable[[Any], Any] = method
        return gather
    from transformers.trainer_pt_utils import nested_gather as gather_nested

    return lambda tensors: gather_nested(tensors, trainer.args.parallel_mode)


def messages_only(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`prepare` for prompts that are lists of messages; text stays as it is."""
    return lambda prompt: prompt if isinstance(prompt, str) else prepare(prompt)


def top_k(value: int | None) -> int:
    """vLLM's `top_k` for a config's: -1, which every vLLM takes for "no limit", for None and 0.

    vLLM refuses None, and before it accepted 0 it refused that too.
    """
    return value or -1


def sampling_limit(tokens: int | None) -> dict[str, int | None]:
    """The prompt limit as a field of `SamplingParams`; nothing where that has no such field."""
    return {"truncate_prompt_tokens": tokens} if _sampling_params_truncate() else {}


def prompt_limit(llm: Any, tokens: int | None) -> dict[str, Any]:
    """The prompt limit as an argument of `generate` and `chat`; nothing where `SamplingParams` takes it.

    Prompts keep their last `tokens` tokens. A limit that the engine's context length does not reach is left out,
    because vLLM refuses it.
    """
    longest = probes.max_model_len(llm)
    if tokens is None or _sampling_params_truncate() or (longest is not None and tokens >= longest):
        return {}
    return {"tokenization_kwargs": {"truncate_prompt_tokens": tokens}}


def _sampling_params_truncate() -> bool:
    from vllm import SamplingParams

    return "truncate_prompt_tokens" in inspect.signature(SamplingParams).parameters
