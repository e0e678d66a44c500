"""Ray and engines of the runs on a cluster, one of each for all cases: starting them takes longer than the cases.

Import it before vLLM and Ray: it sets their environment.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import processes
from tests.cases import GRACE, case
from tests.cpu.features import TEMPLATE

ENGINES = 2
MAX_SEQS = 8
CLUSTER = {"num_cpus": 4, "object_store_memory": 200 * 2**20, "include_dashboard": False, "log_to_driver": False}
ATTEMPTS = 3
"""A busy machine gives Ray's agent too little time to start, whose port the raylet waits for: it aborts then (2.60,
"Timed out waiting for file ... metrics_agent_port")."""
RAYLET_SECONDS = 130.0
"""For the raylet to be up. Ray gives it 30 (2.60, `Node.__init__`), in which two agents start, too: too few on a busy
machine."""

LIMITS = {"init": 240.0, "health": 120.0, "sync": 90.0, "rollout": 240.0, "abort": 60.0}
"""Of the engines, in seconds: shorter than a case may last, so that what did not answer is named by an error, and long
for two cores that others use, too. The defaults, 20 minutes for a start, are a large model's."""

LOGS = "raylet.out", "gcs_server.out", "worker-*.err", "python-core-worker-*.log"
"""What Ray says of itself, and is shown when a run fails."""

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
        try:
            with case("start of Ray", 420.0):
                start_ray({**CLUSTER, "_temp_dir": place})
            yield
        except BaseException:
            show_logs(Path(place))
            raise
        finally:
            with case("shutdown", 60.0, spare=GRACE):
                import ray

                import trlpatch.ray

                trlpatch.ray.shutdown()
                ray.shutdown()


def show_logs(place: Path, lines: int = 12, files: int = 12) -> None:
    """Print the ends of Ray's logs, the newest files of each kind."""
    for pattern in LOGS:
        found = sorted(place.glob(f"session_2*/logs/{pattern}"), key=lambda file: file.stat().st_mtime)
        for file in found[-files:]:
            text = file.read_text(encoding="utf-8", errors="replace").splitlines()
            failed = [line for line in text[:-lines] if "Check failed" in line]  # stacks follow it
            if last := failed[:2] + text[-lines:]:
                print(f"end of {file.name}:", *(line[:300] for line in last), sep="\n  ", file=sys.stderr)


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
            with patience(RAYLET_SECONDS):
                ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            end_daemons(options["_temp_dir"])
            print(f"ray.init failed the {attempt + 1}. time: {error}", file=sys.stderr)
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(2.0 * (attempt + 1))


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Have `ray.init` wait longer for its raylet."""
    from ray._private import services

    look = services.get_node

    def look_longer(*args: Any, **named: Any) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return look(*args, **named)
            except RuntimeError:  # it is not there yet, or GCS does not answer
                if time.monotonic() > deadline or not raylet_runs():
                    raise
                time.sleep(0.5)

    services.get_node = look_longer
    try:
        yield
    finally:
        services.get_node = look


def raylet_runs() -> bool:
    """Does one that this process has started?"""
    return any("/raylet/raylet " in processes.command_of(pid) for pid in processes.children())


def end_daemons(place: str) -> None:
    """End what a `ray.init` that failed leaves running (2.60): its node is not known to `ray.shutdown` yet."""
    for pid in processes.children():
        if place in processes.command_of(pid):
            os.kill(pid, signal.SIGKILL)


def create(checkpoint: Path, number: int = ENGINES, **changes: Any) -> Any:
    """Engines of the size that `tiny.engine` has."""
    import trlpatch.ray
    from trlpatch.ray.timeouts import Timeouts

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_lora_rank": 16,
        "max_model_len": 256,
        "max_num_seqs": MAX_SEQS,
        "timeouts": Timeouts(**LIMITS),
    }
    return trlpatch.ray.create_engines(checkpoint, number, **{**settings, **changes})
