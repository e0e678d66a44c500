"""Saved adapters: a LoRARequest for an adapter directory, which vLLM computes as PEFT does or not at all.

vLLM below 0.32 ignores `rank_pattern` and `alpha_pattern`: such an adapter is given to it as one of a single rank with
the scaling in lora_B. What it would leave out without a word (trained biases, token rows, base weights rewritten by
PiSSA) is refused by the rules for live adapters.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.engine import probes
from trlpatch.engine.private_files import private_directory
from trlpatch.engine.protocols import LLMEngine, LoraRequest, RolloutEngine
from trlpatch.engine.state import EngineState
from trlpatch.errors import AdapterNotExpressible, RankAboveEngine, StaleAdapter
from trlpatch.policy.adapter_tensors import PEFT_PREFIX
from trlpatch.policy.lora_support import config_reason

if TYPE_CHECKING:
    from torch import Tensor

FIRST_ID = 1_600_000_000
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(directory: Path) -> bool:
    """Has it the files of a PEFT adapter?"""
    return (directory / _CONFIG).is_file()


def saved_request(directory: Path, engine: RolloutEngine, state: EngineState) -> LoraRequest:
    """The request for the adapter as the files have it now: one number per content, whatever their times are.

    Raises:
        AdapterNotExpressible: vLLM would compute something else.
        RankAboveEngine: of a layer, after rank_pattern.
        ValueError: there are no weights in the directory.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(directory))
    reason = config_reason(config)
    if reason is not None:
        raise AdapterNotExpressible(
            f"model.load_lora({str(directory)!r}): vLLM cannot serve this adapter as PEFT computes it: {reason}; "
            "expected a plain LoRA adapter. Load it into a model with PEFT, merge it and build an engine of that"
        )
    files = [directory / _CONFIG, _weights(directory)]
    content = _content(files, state)
    number = state.disk_adapters.setdefault(content, len(state.disk_adapters) + 1)
    path = directory.resolve()
    if _pattern(config, "alpha_pattern") or _pattern(config, "rank_pattern"):
        path = _folded(files[1], config, content, engine, state)
    else:
        state.disk_files[FIRST_ID + number] = files, content
    from vllm.lora.request import LoRARequest

    request: LoraRequest = LoRARequest(
        lora_name=f"{directory.name}-{number}", lora_int_id=FIRST_ID + number, lora_path=str(path)
    )
    return request


def refuse_rewritten(given: LoraRequest, inner: LLMEngine, state: EngineState) -> None:
    """vLLM reads the files when the first request comes: are they those that the LoRARequest was made for?

    Raises:
        StaleAdapter: they are not, and the engine has not read them before.
    """
    known = state.disk_files.get(given.lora_int_id) if state.disk_files else None
    if known is None:
        return
    files, content = known
    try:
        if _content(files, state) == content:
            return
        what = "was written since"
    except OSError as error:
        what = f"cannot be read any more ({error.strerror})"
    loaded: Any = getattr(inner, "list_loras", set)
    if given.lora_int_id in loaded():
        return
    raise StaleAdapter(
        f"a request for the saved adapter {str(files[0].parent)!r} as it was when model.load_lora gave it: the "
        f"directory {what}, and vLLM, which reads it now, would serve another adapter under that name; expected the "
        "same files until the first rollout: call model.load_lora(directory) again, or save each adapter in a "
        "directory of its own"
    )


def _weights(directory: Path) -> Path:
    found = next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)
    if found is None:
        raise ValueError(
            f"model.load_lora({str(directory)!r}): expected {' or '.join(_WEIGHTS)} beside {_CONFIG}, found neither; "
            "save the adapter with model.save_lora(directory)"
        )
    return found


def _content(files: list[Path], state: EngineState) -> str:
    """A digest of the files; computed anew when one of them is another, or was written (ctime cannot be set back)."""
    stats = [file.stat() for file in files]
    stamp = tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in stats)
    known = state.disk_contents.get(stamp)
    if known is None:
        whole = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        known = state.disk_contents[stamp] = whole.hexdigest()
    return known


def _pattern(config: Any, name: str) -> dict[str, Any]:
    return dict(getattr(config, name, None) or {})


def _folded(weights: Path, config: Any, content: str, engine: RolloutEngine, state: EngineState) -> Path:
    """A copy of one rank, without patterns, in a private directory of this engine's."""
    if state.private_directory is None:
        state.private_directory, _ = private_directory(state)
    directory: Path = state.private_directory / content[:16]
    if (directory / _CONFIG).is_file():
        return directory
    tensors = _read(weights)
    pairs = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    other = sorted(set(tensors) - {f"{path}.lora_{side}.weight" for path in pairs for side in "AB"})
    if other:
        raise AdapterNotExpressible(
            f"model.load_lora({str(weights.parent)!r}): it has patterns, and with them {other[0]!r}, which is no A or "
            "B of a linear layer; expected a plain LoRA adapter"
        )
    rank = max(tensors[f"{path}.lora_A.weight"].shape[0] for path in pairs)
    limit = probes.max_lora_rank(engine)
    if limit and rank > limit:
        raise RankAboveEngine(
            f"model.load_lora({str(weights.parent)!r}): rank {rank} (rank_pattern) is above the engine's "
            f"max_lora_rank={limit}; build the engine with max_lora_rank={rank}"
        )
    folded = {}
    for path in pairs:
        a, b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
        scaling = _scaling(path.removeprefix(PEFT_PREFIX), a.shape[0], config)
        own_a, own_b = a.new_zeros(rank, a.shape[1]), b.float().new_zeros(b.shape[0], rank)
        own_a[: a.shape[0]] = a
        own_b[:, : b.shape[1]] = b.float() * scaling
        folded[f"{path}.lora_A.weight"], folded[f"{path}.lora_B.weight"] = own_a, own_b
    from safetensors.torch import save_file

    directory.mkdir(mode=0o700, exist_ok=True)
    save_file(folded, directory / _WEIGHTS[0])
    plain = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in pairs}),
        "bias": "none",
    }
    (directory / _CONFIG).write_text(json.dumps(plain))  # last: it says that all is there
    return directory


def _read(weights: Path) -> dict[str, Tensor]:
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: dict[str, Tensor] = load_file(weights)
    else:
        import torch

        found = torch.load(weights, map_location="cpu", weights_only=True)
    return found


def _scaling(path: str, rank: int, config: Any) -> float:
    """What PEFT scales B @ A of this layer by."""
    from peft.utils.other import get_pattern_key

    alphas = _pattern(config, "alpha_pattern")
    alpha = alphas.get(get_pattern_key(alphas.keys(), path), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if getattr(config, "use_rslora", False) else rank))
