"""What the tests of FastLanguageModel share: rollouts, seeds, interruptions, and what a load must leave as it was."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # noqa: F401  # sets vLLM's environment

import gc
import os
import random
import signal
from typing import Any

import numpy
import psutil
import torch
import vllm

SMALL: dict[str, Any] = {"max_seq_length": 256, "load_in_4bit": False, "enforce_eager": True, "max_num_seqs": 32}
PARAMS: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "logprobs": 0, "ignore_eos": True}


def rollout(policy: Any, **changes: Any) -> Any:
    (output,) = policy.fast_generate(
        ["the cat sat on"], sampling_params=vllm.SamplingParams(**PARAMS), use_tqdm=False, **changes
    )
    return output


def draw_seeds() -> list[Any]:
    """Seeds that no engine would choose, and the states that they make."""
    random.seed(1234)
    numpy.random.seed(1234)
    torch.manual_seed(1234)
    return random_state()


def random_state() -> list[Any]:
    return [random.getstate()[1][:8], numpy.random.get_state()[1][:8].tolist(), torch.get_rng_state().tolist()]


class Surroundings:
    """What a load must leave as it was; the engine of `loaded` may be alive."""

    def __init__(self) -> None:
        draw_seeds()
        self.engines = self._engines()  # first: what it imports sets environment variables
        self.seen = self._look()

    def check(self) -> None:
        assert self._engines() <= self.engines, "an engine is left"
        for name, seen in self._look().items():
            assert seen == self.seen[name], name

    def _look(self) -> dict[str, Any]:
        from vllm.distributed import parallel_state

        groups = [torch.distributed.is_initialized(), parallel_state._WORLD is None, parallel_state._TP is None]
        children = [child.pid for child in psutil.Process().children(recursive=True)]
        return {"seeds": random_state(), "environment": dict(os.environ), "groups": groups, "children": children}

    def _engines(self) -> int:
        from vllm.v1.worker.cpu_worker import CPUWorker

        gc.unfreeze()
        gc.collect()
        return sum(type(thing) is CPUWorker for thing in gc.get_objects())


def interrupt(*_: Any, **__: Any) -> None:
    """As Ctrl-C does it: the signal's handler raises between two instructions."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started to ignore it
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass


PLACES = {
    # Of the loader, not of a runner: vLLM has two classes CPUModelRunner, and from 0.29 on it prefers the second.
    "while the weights are read": "vllm.model_executor.model_loader.default_loader.DefaultModelLoader.load_weights",
    "while the KV cache is made": "vllm.v1.engine.core.EngineCore._initialize_kv_caches",
    "when the engine is done": "vllm.entrypoints.llm.load_chat_template",
    "while transformers reads": "trlpatch.loading.loading.load_transformers_model",
    "while comparing": "trlpatch.loading.loading._compare",
}
