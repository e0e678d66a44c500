"""Ray and engines of the runs on a cluster, one of each for all cases: starting them takes longer than the cases.

Import it before vLLM and Ray: it sets their environment.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cpu.features import TEMPLATE

ENGINES = 2
MAX_SEQS = 8
CLUSTER = {"num_cpus": 4, "object_store_memory": 200 * 2**20, "include_dashboard": False, "log_to_driver": False}
ATTEMPTS = 5
"""A busy machine gives Ray's agent too little time to start: ray.init fails then."""

os.environ |= {
    "RAY_AUTH_MODE": "disabled",  # a local cluster needs no token
    "RAY_worker_niceness": "0",  # actors that start at 15 starve on a busy machine
    "RAY_memory_monitor_refresh_ms": "0",  # it kills actors when the host's memory is 95 % full, whoever fills it
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass
class Rig:
    """What all cases share: starting Ray and an engine takes longer than all that they do."""

    directory: Path
    checkpoint: Path
    engines: Any

    def policy(self) -> Any:
        """Give a fresh adapter to a fresh model and attach the engines."""
        import trlpatch

        return trlpatch.attach_engine(tiny.policy(self.checkpoint), self.engines)


@contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster of this process, and no engine of it left behind."""
    # Ray's sockets have paths of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as place:
        start_ray({**CLUSTER, "_temp_dir": place})
        try:
            yield
        finally:
            import ray

            import trlpatch.ray

            trlpatch.ray.shutdown()
            ray.shutdown()


def checkpoint_in(directory: Path) -> Path:
    """Save a tiny model whose tokenizer renders conversations."""
    checkpoint = tiny.checkpoint(directory / "model")
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(checkpoint)
    return checkpoint


def start_ray(options: dict[str, Any]) -> None:
    """`ray.init`, again where it failed."""
    import ray

    for attempt in range(ATTEMPTS):
        try:
            ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            print(f"ray.init failed the {attempt + 1}. time: {error}", file=sys.stderr)
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(2.0 * (attempt + 1))


def create(checkpoint: Path, number: int = ENGINES, **changes: Any) -> Any:
    """Engines of the size that `tiny.engine` has."""
    import trlpatch.ray

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_lora_rank": 16,
        "max_model_len": 256,
        "max_num_seqs": MAX_SEQS,
    }
    return trlpatch.ray.create_engines(checkpoint, number, **{**settings, **changes})
