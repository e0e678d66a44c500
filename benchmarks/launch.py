"""Processes of a benchmark: each in a session of its own, all of them ended with it; and the ranks of a case."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests import ports
from tests.runs.judge import last_error

GRACE = 15.0
"""Seconds that the other ranks have to end by themselves once one has ended or is late."""

# Multicast over NVLink is off where others share the host's GPUs: neither NCCL nor vLLM's own all-reduce uses it.
_WITHOUT_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}  # fmt: skip

_running: set[subprocess.Popen[bytes]] = set()
_terminated = threading.Event()


def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which `end` ends with all that it has started; options are Popen's."""
    child: subprocess.Popen[bytes] = subprocess.Popen(command, start_new_session=True, **options)
    _running.add(child)
    if _terminated.is_set():  # cases run in threads, and one may be on its way to here
        _kill(child)
    return child


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill what `start` has started, if any of it runs still."""
    _kill(child)
    child.wait()
    _running.discard(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def end_all_when_terminated() -> None:
    """Have SIGTERM, as `timeout` sends it, end everything first: ranks that are left behind keep their GPUs."""

    def terminated(number: int, _: object) -> NoReturn:
        _terminated.set()
        for child in list(_running):  # whoever waits for it, with Popen's lock, goes on to do so
            _kill(child)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, terminated)


def rank_environment(rank: int, ranks: int, devices: str | None, scratch: Path) -> dict[str, str]:
    """Return what torchrun would tell a rank, and what keeps ranks of one host apart; `devices` None is a CPU."""
    found = {
        **_WITHOUT_MULTICAST,
        "DS_ACCELERATOR": "cpu" if devices is None else "cuda",
    }  # fmt: skip
    if devices is not None:  # ranks that fill one cache of compiled graphs wait for each other
        found |= {"CUDA_VISIBLE_DEVICES": devices, "VLLM_CACHE_ROOT": str(scratch / f"vllm-cache{rank}")}
    if ranks > 1:
        found |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": f"ranks{os.getpid()}",
        }  # fmt: skip
    return found


def run_ranks(
    command_of: Callable[[int], list[str]], ranks: int, devices: str | None, environ: dict[str, str], folder: Path,
    logs: list[Path], timeout: float, patience: float = 0.0,
) -> list[str]:  # fmt: skip
    """Run a command for each rank, with what it prints in `logs`; return the errors, none if every rank ended with 0.

    `environ` is that of all ranks. They meet at one MASTER_PORT; what else each of their engines opens is its own.
    """
    blocks = [ports.environment() for _ in range(ranks)]
    children = []
    try:
        for rank, (block, log) in enumerate(zip(blocks, logs, strict=True)):
            own = {"MASTER_PORT": blocks[0]["MASTER_PORT"], "VLLM_PORT": block["VLLM_PORT"]}
            variables = {**environ, **own, **rank_environment(rank, ranks, devices, folder)}
            with log.open("wb") as file:
                children.append(
                    start(command_of(rank), env=variables, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
                )
    finally:
        statuses = wait_for(children, timeout if len(children) == ranks else 0.0, patience)
    return [
        f"rank {rank}: {'no end after ' + format(timeout, 'g') + ' s; last: ' if status is None else ''}"
        + last_error(log.read_text(encoding="utf-8", errors="replace"))
        for rank, (status, log) in enumerate(zip(statuses, logs, strict=True))
        if status != 0
    ]


def wait_for(children: list[subprocess.Popen[bytes]], timeout: float, patience: float = 0.0) -> list[int | None]:
    """Wait for all; once one has failed, or it is late, end the others. Statuses, None for one that was ended here.

    With `patience` they are asked first, and given so many seconds to end what they have started.
    """
    deadline, statuses = time.monotonic() + timeout, [child.poll() for child in children]
    try:
        while None in statuses and time.monotonic() < deadline:
            time.sleep(0.2)
            statuses = [child.poll() for child in children]
            if any(statuses):  # a rank alone waits for ever in its next collective
                deadline = min(deadline, time.monotonic() + GRACE)
        return statuses
    finally:
        if patience and any(child.poll() is None for child in children):
            for child in children:
                child.terminate()
            patient = time.monotonic() + patience
            while any(child.poll() is None for child in children) and time.monotonic() < patient:
                time.sleep(0.2)
        for child in children:
            end(child)


def absolute(paths: str) -> list[str]:
    """Return the folders of a PYTHONPATH so that they hold in another directory."""
    return [str(Path(path).resolve()) for path in paths.split(os.pathsep) if path]
