"""Handing a LoRA adapter to an engine: one interface, several ways, unknown outside this room."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any, Protocol

from trlpatch.engine import probes
from trlpatch.engine.lora_view import AdapterTensors, LoraView, adapter_tensors, fingerprint
from trlpatch.engine.notices import once
from trlpatch.engine.state import EngineState, Published, state_of
from trlpatch.errors import AdapterNotExpressible, StaleAdapter

# Far above what people number their own adapters with, far below 2**31 (vLLM keeps ids in int32 tensors).
_FIRST_ID = 1_700_000_000


class AdapterHandover(Protocol):
    """One way of getting adapter tensors into an engine."""

    def publish(self, adapter: AdapterTensors) -> Any:
        """Make these tensors servable and return a `LoRARequest` for them, with a name and an id never used
        before.

        The version published before is dropped. Raises AdapterNotExpressible when the engine has no place for
        one of the adapted modules; the version published before then still stands.
        """

    def holds(self, request: Any) -> bool:
        """Is the adapter of this request still servable? vLLM may have evicted it for another one."""


# One count per process, not per engine: a name must not come back when an engine is detached and attached again.
_versions = itertools.count(1)


def _fresh_request(directory: Path) -> Any:
    """Make a request whose name, id and path (below `directory`) no earlier version had.

    vLLM keys its prefix cache by the id up to 0.11.0, then by the name, and from 0.31 by name and path; its
    registry of adapters by the id.
    """
    from vllm.lora.request import LoRARequest

    number = next(_versions)
    name = f"trlpatch-v{number}"
    return LoRARequest(lora_name=name, lora_int_id=_FIRST_ID + number, lora_path=str(directory / name))


class InMemory:
    """Registers the adapter with the worker's LoRA manager, which lives in this process.

    A request whose id is registered never makes vLLM look at its path
    (`LRUCacheWorkerLoRAManager.add_adapter`, 0.8.0 to 0.33.0). The path is absolute and does not exist:
    should vLLM ever drop the adapter, loading it fails at once and without asking the hub.
    """

    _NOWHERE = Path("/nonexistent/trlpatch")

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        self._current: int | None = None

    def publish(self, adapter: AdapterTensors) -> Any:
        """Register the tensors with the worker; see AdapterHandover."""
        worker = self._worker()
        manager = worker._adapter_manager
        request = _fresh_request(self._NOWHERE)
        lora = self._lora_model(worker, adapter, request.lora_int_id)
        if self._current is not None:
            manager.remove_adapter(self._current)
            self._current = None
        # Make room as vLLM's own loader does: capacity is max_cpu_loras, which defaults to max_loras.
        if len(manager) + 1 > manager.capacity and hasattr(manager, "remove_oldest_adapter"):
            manager.remove_oldest_adapter()
        manager.add_adapter(lora)
        manager.activate_adapter(request.lora_int_id)
        self._current = request.lora_int_id
        return request

    def holds(self, request: Any) -> bool:
        """Ask the worker's registry."""
        return request.lora_int_id in self._worker().list_adapters()

    def _worker(self) -> Any:
        worker = probes.worker_lora_manager(self._engine())
        if worker is None:
            raise StaleAdapter(
                "handing the adapter over: the engine's worker is no longer in this process; expected the engine "
                "that was attached to be alive; build a new one and call trlpatch.attach_engine(model, llm)"
            )
        return worker

    def _lora_model(self, worker: Any, adapter: AdapterTensors, lora_id: int) -> Any:
        from vllm.lora.peft_helper import PEFTHelper

        manager = worker._adapter_manager
        helper = PEFTHelper.from_dict(
            {"r": adapter.rank, "lora_alpha": adapter.rank, "target_modules": list(adapter.targets)}
        )
        helper.validate_legal(worker.lora_config)
        build = _lora_model_class(worker).from_lora_tensors
        optional = {
            "device": None,  # keep each tensor where it is
            "dtype": worker.lora_config.lora_dtype,
            "weights_mapper": _weights_mapper(manager.model),
            "skip_prefixes": getattr(manager.model, "lora_skip_prefixes", None),
        }
        lora = build(
            lora_model_id=lora_id,
            tensors=adapter.tensors,
            peft_helper=helper,
            **probes.accepted(build, optional),
        )
        # vLLM's own loader refuses modules it does not know; this entrance would drop them without a word.
        known = set(manager.modules).union(*manager.packed_modules.values())
        unknown = sorted(set(lora.loras) - known)
        if unknown:
            raise AdapterNotExpressible(
                f"the engine's model has no LoRA layer for {', '.join(unknown[:4])}"
                + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
            )
        return lora


class OnDisk:
    """Writes the adapter to a private directory for the engine to load: its worker is elsewhere."""

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        memory = Path("/dev/shm")
        parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
        self._directory = tempfile.TemporaryDirectory(prefix="trlpatch-adapter-", dir=parent)  # mode 0700
        self._current: Any = None

    def publish(self, adapter: AdapterTensors) -> Any:
        """Write the tensors and have the engine read them at once; see AdapterHandover."""
        from safetensors.torch import save_file

        engine = self._engine()
        request = _fresh_request(Path(self._directory.name))
        path = Path(request.lora_path)
        path.mkdir(mode=0o700)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "",
            "r": adapter.rank,
            "lora_alpha": adapter.rank,
            "target_modules": list(adapter.targets),
            "bias": "none",
        }
        save_file(
            {name: tensor.cpu() for name, tensor in adapter.tensors.items()},
            path / "adapter_model.safetensors",
        )
        (path / "adapter_config.json").write_text(json.dumps(config))
        old, self._current = self._current, request
        if old is not None:
            self._call(engine, "remove_lora", old.lora_int_id)
            shutil.rmtree(old.lora_path, ignore_errors=True)
        try:
            self._call(engine, "add_lora", request)
        except ValueError as error:
            raise AdapterNotExpressible(f"vLLM refuses the adapter: {error}") from error
        return request

    def holds(self, request: Any) -> bool:
        """Tell whether this is the newest version."""
        # Evicted or not, vLLM can read it again: the newest version's files are kept.
        return self._current is request

    @staticmethod
    def _call(engine: Any, method: str, argument: Any) -> None:
        function = getattr(getattr(engine, "llm_engine", None), method, None)
        if callable(function):
            function(argument)


def _lora_model_class(worker: Any) -> Any:
    found = getattr(worker, "_lora_model_cls", None)
    if found is not None:
        return found
    try:
        from vllm.lora.lora_model import LoRAModel  # 0.13.0 and newer
    except ImportError:
        from vllm.lora.models import LoRAModel
    return LoRAModel


def _weights_mapper(model: Any) -> Any:
    """transformers' names -> vLLM's, without the fusion of q/k/v and gate/up (the manager packs those
    itself).

    Up to 0.24 the mapper only renames; 0.25 gave it fusion and `get_unstacked_mapper`, 0.29
    `get_rename_mapper`.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for unfused in ("get_rename_mapper", "get_unstacked_mapper"):
        if hasattr(mapper, unfused):
            return getattr(mapper, unfused)()
    return mapper


def choose_handover(engine: Any) -> AdapterHandover:
    """In memory when the engine's worker is in this process, else through files."""
    if probes.worker_lora_manager(engine) is not None:
        return InMemory(engine)
    once(
        engine,
        "the engine's worker runs in another process: adapters are handed over through files in a private directory",
        level=logging.INFO,
    )
    return OnDisk(engine)


def publish(view: LoraView, model: Any, engine: Any) -> Any:
    """Hand the active adapter of `model` to the engine, whose weights must be awake; its request."""
    state = state_of(engine)
    if state.handover is None:
        state.handover = choose_handover(engine)
    mark = fingerprint(view)  # before the copies are made: a later change must not look published
    request = state.handover.publish(adapter_tensors(view, view.active[0]))
    state.published = Published(request, mark, weakref.ref(model))
    state.holds = "adapter"
    # Names are new, so the prefix cache cannot match an older adapter; dropping it returns its blocks.
    reset = getattr(engine, "reset_prefix_cache", None)
    if callable(reset):
        reset()
    return request


def current_request(view: LoraView, model: Any, state: EngineState) -> Any:
    """The request of the adapter as it is now, or None when it has to be handed over (again) first."""
    published = state.published
    if published is None or state.handover is None or published.model() is not model:
        return None
    if not state.handover.holds(published.request) or published.fingerprint != fingerprint(view):
        return None
    return published.request
