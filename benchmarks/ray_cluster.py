"""A Ray cluster for several trainer ranks, in a process of its own; a single trainer starts one by itself."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ATTEMPTS = 6
UP_S = 300.0
"""Seconds for a cluster to be up."""
_OBJECTS = 200 * 2**20
"""Bytes of the object store on a CPU; on GPUs it is Ray's own choice."""


def start(engines: int, *, cuda: bool, **options: Any) -> None:
    """Start a small cluster; on a busy machine Ray gives up at times, and does it when asked again."""
    import ray

    small = {} if cuda else {"object_store_memory": _OBJECTS, "num_cpus": max(4, 2 * engines)}
    for attempt in range(ATTEMPTS):
        try:
            ray.init(
                include_dashboard=False, log_to_driver=False, _temp_dir=tempfile.mkdtemp(prefix="ray", dir="/tmp"),
                **small, **options,
            )  # fmt: skip
            return
        except Exception:
            ray.shutdown()
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(2)


@contextmanager
def head(engines: int, devices: list[str], environ: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Have a cluster with these GPUs, or none, while in the `with`; its address, for RAY_ADDRESS.

    Raises:
        RuntimeError: it did not come up.
    """
    log, told = folder / "head.log", folder / "head-address"
    variables = {**environ, **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})}
    command = [sys.executable, str(Path(__file__).resolve()), str(engines), str(len(devices)), str(told)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + UP_S
        while not told.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Ray cluster of the ranks did not come up: {log.read_text()[-400:]}")
            time.sleep(0.1)
        yield told.read_text(encoding="utf-8")
    finally:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(engines: int, gpus: int, told: Path) -> None:
    """Be the head until stdin ends."""
    import ray

    start(engines, cuda=bool(gpus), num_gpus=gpus)
    part = told.with_suffix(".part")
    part.write_text(ray.get_runtime_context().gcs_address, encoding="utf-8")
    part.replace(told)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
