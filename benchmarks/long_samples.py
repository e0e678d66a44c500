"""Series of a long run: what a process holds after each training step, and whether a series is flat."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, mean
from typing import Any

MIB = 2**20
COLLECTED_EVERY = 5
"""Steps between two counts of Python's objects: each begins with a garbage collection."""

Sample = dict[str, float]


@dataclass(frozen=True)
class Series:
    """One thing that is measured after every step.

    Attributes:
        key: in the samples.
        title: in the table and the picture, with the unit.
        allowed: growth that is still flat, in that unit, in 100 steps and in all; None where it is not judged.
        relative: `allowed` is a share of the mean.
    """

    key: str
    title: str
    allowed: float | None
    relative: bool = False


SERIES = (
    Series("rss", "resident memory, MiB", 4.0),
    Series("allocated", "device: allocated by torch, MiB", 1.0),
    Series("reserved", "device: reserved by torch, MiB", 32.0),
    Series("used", "device: in use, MiB", 32.0),
    Series("adapters", "adapters registered in vLLM", 0.0),
    Series("requests", "unfinished requests in vLLM", 0.0),
    Series("blocks", "KV blocks held between steps", 0.0),
    Series("files", "open file descriptors", 0.0),
    Series("shm", "new entries in /dev/shm", 0.0),
    Series("tmp", "entries in the temporary directory", 0.0),
    Series("threads", "threads", 0.0),
    Series("processes", "child processes", 0.0),
    Series("tensors", "live tensors", 0.0),
    # transformers appends a dict to `state.log_history` and a step of its own adds nothing else: 100 in 100 steps, and
    # three more for evaluations and checkpoints.
    Series("objects", "objects that gc tracks", 300.0),
    Series("wall", "seconds a step", 0.1, relative=True),
    Series("cpu", "CPU seconds a step", 0.1, relative=True),
)
"""In the order of the table. On a CPU the clock says how busy the machine is: there CPU time is judged instead."""


@dataclass(frozen=True)
class Trend:
    """What became of one series over the last two thirds of a run.

    Attributes:
        early, late: means of the first and the last tenth of these two thirds.
        slope: of the least-squares line, in 100 steps.
        allowed: the series grows if both the slope and `late - early` are above it; None where it is not judged.
    """

    early: float
    late: float
    slope: float
    allowed: float | None

    @property
    def verdict(self) -> str:
        """`flat`, `GROWS`, or `not judged`."""
        if self.allowed is None:
            return "not judged"
        # Both: in a short run noise has a steep slope, and in a long one a slow leak is a large difference.
        return "GROWS" if min(self.slope, self.late - self.early) > self.allowed + 1e-9 else "flat"


def trend(series: Series, steps: Sequence[float], values: Sequence[float]) -> Trend:
    """Fit a line through the last two thirds of a series."""
    start = len(steps) // 3
    xs, ys = list(steps[start:]), list(values[start:])
    slope = 100.0 * linear_regression(xs, ys).slope if len(set(xs)) > 1 else 0.0
    tenth = max(1, len(ys) // 10)
    allowed = series.allowed
    if allowed is not None and series.relative:
        allowed *= mean(ys)
    return Trend(mean(ys[:tenth]), mean(ys[-tenth:]), slope, allowed)


def trends(samples: Sequence[Sample], *, cuda: bool) -> dict[str, Trend]:
    """Return the trend of every series that was measured, by its key."""
    found = {}
    for series in SERIES:
        rows = [(sample["trained"], sample[series.key]) for sample in samples if series.key in sample]
        if len(rows) > 2:
            unjudged = series.key == ("cpu" if cuda else "wall")
            judged = Series(series.key, series.title, None) if unjudged else series
            found[series.key] = trend(judged, [at for at, _ in rows], [value for _, value in rows])
    return found


class Sampler:
    """Reads what this process and its engine hold; made when training begins."""

    def __init__(self, engine: Any) -> None:
        import psutil

        self._engine = engine
        self._process = psutil.Process()
        self._began = time.time()
        self._types: Counter[str] = Counter()
        self.grown: dict[str, int] = {}
        """By type, how many objects more there are than at the first third's end; see `mark`."""

    def sample(self, trained: int) -> Sample:
        """Read everything that is cheap, and every few steps the objects."""
        sample = {
            "rss": self._process.memory_info().rss / MIB,
            "files": float(self._process.num_fds()),
            "threads": float(self._process.num_threads()),
            "processes": float(len(self._process.children(recursive=True))),
            "shm": float(self._new_shared_memory()),
            "tmp": float(sum(1 for _ in Path(tempfile.gettempdir()).rglob("*"))),
            **self._of_engine(),
            **self._of_device(),
        }
        if trained % COLLECTED_EVERY == 0:
            gc.collect()
            types = Counter(map(type, gc.get_objects()))
            sample |= {"objects": float(types.total()), "tensors": float(_tensors(types))}
        return sample

    def mark(self) -> None:
        """Remember what types of objects there are, or, the second time, how many of each have come."""
        gc.collect()
        types = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in map(type, gc.get_objects()))
        if self._types:
            self.grown = dict((types - self._types).most_common(12))
        self._types = types

    def _new_shared_memory(self) -> int:
        found = 0
        for entry in os.scandir("/dev/shm") if Path("/dev/shm").is_dir() else ():
            try:
                found += entry.stat(follow_symlinks=False).st_ctime >= self._began
            except FileNotFoundError:  # another process's, gone meanwhile
                continue
        return found

    def _of_engine(self) -> Sample:
        from trlpatch.engine import probes

        manager = probes.worker_lora_manager(self._engine)
        requests = probes.reach(self._engine, "llm_engine", "output_processor", "request_states")
        pool = probes.reach(probes.engine_core(self._engine), "scheduler", "kv_cache_manager", "block_pool")
        found: Sample = {}
        if manager is not None:
            found["adapters"] = float(len(manager.list_adapters()))
        if requests is not None:
            found["requests"] = float(len(requests))
        if pool is not None:
            found["blocks"] = float(pool.num_gpu_blocks - pool.get_num_free_blocks())
        return found

    @staticmethod
    def _of_device() -> Sample:
        import torch

        if not torch.cuda.is_available():
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "allocated": torch.cuda.memory_allocated() / MIB,
            "reserved": torch.cuda.memory_reserved() / MIB,
            "used": (total - free) / MIB,
        }


def _tensors(types: Mapping[type, int]) -> int:
    import torch

    return sum(count for kind, count in types.items() if issubclass(kind, torch.Tensor))
