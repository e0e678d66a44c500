"""Build an engine in this process, and take one down so that nothing of it is left."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import os
import sys
import traceback
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.lora_limits import MAX_CPU_LORAS
from trlpatch.engine.memory import cumem
from trlpatch.engine.model_inspection import inspected_here
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.single_adapter.install import lora_layers
from trlpatch.engine.state import forget
from trlpatch.engine.vllm_source import class_fields
from trlpatch.exception_chain import exception_chain
from trlpatch.log import logger

MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"

_INSIDE = ("llm_engine", "engine_core", "model_executor", "driver_worker")

_allocators: list[object] = []
"""Wrappers of pluggable allocators whose pools were dropped: a block that is freed later still calls into them."""


@cache
def engine_argument_names() -> frozenset[str]:
    """The arguments that the installed vLLM's engine takes; none where vLLM is not installed.

    Read from the source of `EngineArgs`: importing vLLM takes seconds and changes this process.
    """
    fields = class_fields("engine/arg_utils.py", "EngineArgs")
    if fields is not None:
        return fields
    return _argument_names_of_imported_vllm() if importlib.util.find_spec("vllm") is not None else frozenset()


def _argument_names_of_imported_vllm() -> frozenset[str]:
    from vllm.engine.arg_utils import EngineArgs

    return frozenset(inspect.signature(EngineArgs).parameters)


def lora_arguments(max_lora_rank: int) -> dict[str, Any]:
    """What makes an engine serve the adapter of a trainer in this process.

    `max_lora_rank` is rounded up to a value that this vLLM accepts. Log-probabilities are those that TRL's importance
    sampling compares with. Scheduling stays asynchronous where vLLM makes it so: without it the device waits for the
    host between two decoding steps. What that leaves in flight is drained at every hand-over, sleep and wake.

    Raises:
        ValueError: no rank that large is legal.
    """
    rank = probes.legal_rank(max_lora_rank)
    if rank is None:
        raise ValueError(f"max_lora_rank={max_lora_rank} is above {probes.legal_ranks()[-1]}, vLLM's largest")
    arguments: dict[str, Any] = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "seed": 0}
    arguments["max_cpu_loras"] = MAX_CPU_LORAS
    known = engine_argument_names()
    if "logprobs_mode" in known:
        arguments["logprobs_mode"] = "processed_logprobs"
    else:
        logger.warning(
            "this vLLM has no logprobs_mode (0.10.0 has): it reports raw log-probabilities, and TRL's importance "
            "sampling correction is biased unless temperature is 1 and top_p, top_k and min_p are off"
        )
    return arguments


def build_engine(arguments: Mapping[str, Any], *, layers: str = "auto") -> RolloutEngine:
    """Return `vllm.LLM(**arguments)`, in this process unless VLLM_ENABLE_V1_MULTIPROCESSING is set otherwise.

    `layers` says whose LoRA layers it has, see `trlpatch.engine.single_adapter.install.lora_layers`. When it fails
    or is interrupted, what was built so far is shut down, its process groups are destroyed and its memory is freed
    before the exception goes on. Seeds the global generators, as vLLM does: see `random_state_kept`.
    """
    groups = ProcessGroups.now()
    let_go_of_engines()
    with _set_unless_given(MULTIPROCESSING, "0"):
        try:
            from vllm import LLM

            with inspected_here(arguments), lora_layers(arguments, layers) as given:
                llm: RolloutEngine = LLM(**given)
            leave_groups(llm)
            return llm
        except BaseException as error:
            parts = _unfinished(error)
            forget_frames(error)
            while parts:
                _take_down(parts.pop(0))
            groups.restore()
            free_memory(groups)
            raise


def let_go_of_engines() -> None:
    """Free engines that nothing refers to any more, as those of a notebook whose cell is run again.

    vLLM calls `gc.freeze()` at the end of building one (seen in 0.23 and 0.28), and `gc.unfreeze()` only in a
    shutdown that nothing asks for: `del llm; gc.collect()` leaves its weights and its KV cache where they are.
    """
    if not gc.get_freeze_count():
        return
    gc.unfreeze()
    if gc.collect():
        gc.collect()  # what finalizers of the first held
        torch = sys.modules.get("torch")  # a process that has not imported it holds none of its memory
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def leave_groups(llm: object) -> None:
    """Have an engine of this process, once nothing refers to it, leave the process groups to those that use them.

    From vLLM 0.31 on, the collection of `InprocClient` calls `EngineCore.shutdown()`, which destroys every group of
    the process, torch's default one as well: a second engine, and a trainer of several ranks, would be without.
    """
    client = probes.reach(llm, "llm_engine", "engine_core")
    finalizer = _finalizer_of(client)
    if finalizer is not None and finalizer.detach() is not None:
        client._finalizer = weakref.finalize(client, _take_down, client.engine_core)
        client._finalizer.atexit = False  # as below 0.31: what a process held is free when it ends


def shut_down(llm: RolloutEngine, groups: ProcessGroups) -> None:
    """Take an engine down that `build_engine` returned; `groups` are those of before it was built.

    The caller drops its reference and everything that views the engine's memory first, and calls `free_memory` after.
    """
    forget(llm)
    _take_down(llm)
    groups.restore()


@dataclass(frozen=True)
class ProcessGroups:
    """Which torch.distributed state there was before an engine was built.

    Attributes:
        default: somebody, the user or an engine, had initialised torch.distributed.
        engine: vLLM's groups existed, and another engine of this process uses them.
    """

    default: bool
    engine: bool

    @classmethod
    def now(cls) -> ProcessGroups:
        """Look without importing torch or vLLM."""
        distributed = sys.modules.get("torch.distributed")
        state = sys.modules.get("vllm.distributed.parallel_state")
        return cls(
            default=bool(distributed and distributed.is_available() and distributed.is_initialized()),
            engine=getattr(state, "_WORLD", None) is not None,
        )

    def restore(self) -> None:
        """Destroy what came since."""
        state: Any = sys.modules.get("vllm.distributed.parallel_state")
        if state is None or self.engine:
            return
        state.destroy_model_parallel()
        if self.default:
            world = state._WORLD
            if world is not None:
                world.destroy()
                state._WORLD = None
        else:
            state.destroy_distributed_environment()
        # The first engine of a process freezes what it read from the environment, where vLLM does that (0.13).
        read_again = getattr(sys.modules.get("vllm.envs"), "disable_envs_cache", None)
        if read_again is not None:
            read_again()


def forget_frames(error: BaseException) -> None:
    """Drop the local variables of the finished frames that `error` and its causes hold, and with them the memory."""
    for one in exception_chain(error):
        traceback.clear_frames(one.__traceback__)
        for frame, _ in traceback.walk_tb(one.__traceback__):
            _ = frame.f_locals  # up to Python 3.12 a frame keeps the dictionary of an earlier look until the next one


def free_memory(groups: ProcessGroups) -> None:
    """Collect what nothing refers to any more, and give the device memory behind it back.

    `groups` says whether an older engine is alive: its sleep pools are left alone.
    """
    gc.unfreeze()  # vLLM freezes the heap when an engine is up, and frozen garbage is never collected
    gc.collect()
    if not groups.engine:
        _release_sleep_pools()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global generators of random, numpy, torch and CUDA as they were: building an engine seeds all four."""
    import random

    import numpy
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.init()  # a seed that was given before CUDA was initialised takes effect now, not inside
    states = (random.getstate(), numpy.random.get_state(), torch.get_rng_state())
    device_states = torch.cuda.get_rng_state_all() if cuda else None
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device_states is not None:
            torch.cuda.set_rng_state_all(device_states)


@contextlib.contextmanager
def environment_kept_on_failure() -> Iterator[None]:
    """Put the environment variables back as they were when the block raises."""
    before = dict(os.environ)
    try:
        yield
    except BaseException:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        raise


@contextlib.contextmanager
def _set_unless_given(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the duration, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _unfinished(error: BaseException) -> list[object]:
    """The parts of an engine (LLM, LLMEngine, EngineCore, executor) whose construction `error` ended, outermost first.

    Nothing but the frames of the exception refers to them: `LLM(...)` has not returned.
    """
    found: list[object] = []
    for one in exception_chain(error):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            part = frame.f_locals.get("self")
            if any(name in getattr(part, "__dict__", {}) for name in _INSIDE) and not any(part is it for it in found):
                found.append(part)
    return found


def _take_down(part: object) -> None:
    """Shut an engine down, from its LLM, its core or its executor, in whatever state its construction left it.

    No backend is asked: what is half built has none.
    """
    for name in ("llm_engine", "engine_core", "engine_core"):  # LLM, LLMEngine, InprocClient
        finalizer = _finalizer_of(part)
        if finalizer is not None:
            finalizer.detach()
        part = getattr(part, name, part)
    executor = part if hasattr(part, "driver_worker") else getattr(part, "model_executor", None)
    if executor is None:
        _end(part, "shutdown")  # a client of an engine in another process
        return
    # Not EngineCore.shutdown(): from vLLM 0.23.0 that destroys process groups that are not the engine's, too.
    _end(getattr(part, "structured_output_manager", None), "clear_backend")
    _end(_within_its_worker(executor), "shutdown")
    _end(getattr(part, "scheduler", None), "shutdown")


def _within_its_worker(executor: object) -> object:
    """The executor with the `shutdown` of UniProcExecutor, which ends the worker and nothing else.

    That of an external launcher's executor destroys in vLLM 0.33 the model-parallel groups, which all engines share.
    """
    above: type = type(executor)
    for cls in type(executor).__mro__[1:]:
        if cls.__name__ == "UniProcExecutor":
            return super(above, executor)
        above = cls
    return executor


def _finalizer_of(client: object) -> weakref.finalize[..., Any] | None:
    """What shuts the core down when its client in this process is collected; None for other parts, and below 0.31."""
    finalizer, core = getattr(client, "_finalizer", None), getattr(client, "engine_core", None)
    if core is None or not isinstance(finalizer, weakref.finalize):
        return None
    # LLMEngine has a finalizer, too: it frees what is compiled, and stays.
    _, function, *_ = finalizer.peek() or (None, None)
    ends_core = function is _take_down or getattr(function, "__self__", None) is core
    return finalizer if ends_core else None


def _end(part: object, method: str) -> None:
    end = getattr(part, method, None)
    if not callable(end):
        return
    try:
        end()
    except Exception as failure:  # half built: what cannot be shut down is dropped
        logger.debug("%s.%s() while taking an engine down: %r", type(part).__name__, method, failure)


def _release_sleep_pools() -> None:
    """Unmap the pools of a dead engine with sleep mode, as vLLM's own shutdown does from 0.24.0.

    Only one engine with sleep mode can exist per process, and vLLM asks the pools whether there is one.
    """
    allocator = cumem.allocator()
    pools = getattr(allocator, "allocator_and_pools", None)
    if not pools or hasattr(allocator, "release_pools"):
        return
    _allocators.extend(entry[1] for entry in pools.values())
    pools.clear()
    gc.collect()
