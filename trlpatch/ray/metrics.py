"""Metrics of rollout engines: queue depth, tokens per second, staleness and syncs, for Ray and for a trainer's log.

`EngineMonitor` asks every engine for its health now and then, from a thread of its own: an engine answers that without
waiting for a step. What it finds goes to Ray's metrics (Prometheus, and with it Ray's dashboard), into what a trainer
logs, and to `trlpatch.ray.progress`.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trlpatch.errors import RolloutTimeout
from trlpatch.log import logger
from trlpatch.ray.messages import EngineHealth

if TYPE_CHECKING:
    from typing import Self

EVERY = 2.0
"""Seconds between two looks."""
PATIENCE = 10.0
"""Seconds that an engine has for saying how it does; one that takes longer is shown as lost until it answers."""
PREFIX = "ray/"
"""Of the names in a trainer's log."""
_OFF_POLICY = "num_steps_off_policy"
"""What AsyncGRPOTrainer logs on Ray engines: versions that its samples are behind."""


class Watched(Protocol):
    """What is asked of engines; `RayEngines` is one."""

    adapter_version: int
    adapter_bytes: int
    sync_seconds: float

    def health(self, timeout: float | None = None) -> list[EngineHealth | BaseException]:
        """How every engine does; its exception in the place of one that cannot say."""


@dataclass(frozen=True)
class EngineFigures:
    """One engine between two looks.

    Attributes:
        index: of the engine.
        state: as in `EngineHealth`; "lost" for one that does not answer.
        waiting: requests that are queued.
        running: requests in the engine.
        tokens_per_s: sampled since the look before.
        steps_per_s: decoding steps since then.
        behind: versions of the adapter that it is behind the one sent last; 0 where it samples without one.
        version: what it samples with, in words.
        idle_s: seconds since a step ended, while requests run.
        reason: why it is lost.
    """

    index: int
    state: str
    waiting: int = 0
    running: int = 0
    tokens_per_s: float = 0.0
    steps_per_s: float = 0.0
    behind: int = 0
    version: str = ""
    idle_s: float = 0.0
    reason: str = ""

    @property
    def answers(self) -> bool:
        """Whether it can be asked for completions."""
        return self.state not in ("lost", "stopped")


@dataclass(frozen=True)
class Figures:
    """All engines at one time.

    Attributes:
        engines: by index.
        syncs: adapters that were sent.
        sync_s: seconds that the last one took to every engine.
        sync_bytes: its size.
        staleness: versions that the last samples trained on were behind, where somebody says so.
    """

    engines: tuple[EngineFigures, ...] = ()
    syncs: int = 0
    sync_s: float = 0.0
    sync_bytes: int = 0
    staleness: float | None = None

    @property
    def queue_depth(self) -> int:
        """Requests that are queued, over all engines."""
        return sum(engine.waiting for engine in self.engines)

    @property
    def running(self) -> int:
        """Requests in engines, over all of them."""
        return sum(engine.running for engine in self.engines)

    @property
    def tokens_per_s(self) -> float:
        """Sampled by all engines together."""
        return sum(engine.tokens_per_s for engine in self.engines)

    @property
    def alive(self) -> int:
        """Engines that can be asked."""
        return sum(engine.answers for engine in self.engines)

    def as_log(self) -> dict[str, float]:
        """Name the figures as a trainer logs them."""
        named = {
            "queue_depth": float(self.queue_depth),
            "running": float(self.running),
            "tokens_per_s": self.tokens_per_s,
            "engines_alive": float(self.alive),
            "versions_behind": float(max((engine.behind for engine in self.engines if engine.answers), default=0)),
        }
        named |= {f"engine_{engine.index}/tokens_per_s": engine.tokens_per_s for engine in self.engines}
        if self.syncs:
            named |= {"sync_ms": self.sync_s * 1e3, "sync_mib": self.sync_bytes / 2**20}
        if self.staleness is not None:
            named["staleness"] = self.staleness
        return {PREFIX + name: value for name, value in named.items()}


@dataclass
class _Before:
    """What an engine had counted at the look before."""

    time: float
    tokens: int
    steps: int


@dataclass
class _Mean:
    """Of what was seen since somebody took it."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1


@dataclass
class _Kept:
    """State that the looking thread and those who read share."""

    figures: Figures = field(default_factory=Figures)
    means: defaultdict[str, _Mean] = field(default_factory=lambda: defaultdict(_Mean))
    staleness: float | None = None


class EngineMonitor:
    """Looks at engines every few seconds until it is stopped, or they are gone.

    It holds no reference to the engines. Listeners are called with every `Figures`, in the looking thread; what one
    raises is logged once, and it is not called again. Those that have a `close` are closed at the end.
    """

    def __init__(self, engines: Watched, *, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        """Look every `every` seconds once `start` is called."""
        self._engines = weakref.ref(engines)
        self._every, self._clock = every, clock
        self._before: dict[int, _Before] = {}
        self._listeners: list[Callable[[Figures], None]] = []
        self._lock = threading.Lock()
        self._kept = _Kept()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def figures(self) -> Figures:
        """What the last look found."""
        with self._lock:
            return self._kept.figures

    def listen(self, listener: Callable[[Figures], None]) -> None:
        """Call `listener` after every look."""
        self._listeners.append(listener)

    def observe_staleness(self, versions: float) -> None:
        """Take note of how many versions behind samples were that were trained on."""
        with self._lock:
            self._kept.staleness = float(versions)

    def take(self) -> dict[str, float]:
        """Return the means since the last call, by the names of a trainer's log; empty where nothing was seen."""
        with self._lock:
            means, self._kept.means = self._kept.means, defaultdict(_Mean)
        return {name: mean.total / mean.count for name, mean in means.items()}

    def look(self) -> Figures | None:
        """Ask all engines once; None when they are gone."""
        engines = self._engines()
        if engines is None or not getattr(engines, "handles", True):
            return None
        now = self._clock()
        try:
            health = engines.health(PATIENCE)
        except RolloutTimeout as error:  # says of one or more that they are silent
            health = [error] * max(1, len(self.figures.engines))
        with self._lock:
            ahead = getattr(engines, "prefetch", 0)  # batches generated ahead are so many versions old
            staleness = self._kept.staleness if self._kept.staleness is not None else ahead or None
            found = Figures(
                tuple(self._one(index, one, now, engines.adapter_version) for index, one in enumerate(health)),
                engines.adapter_version, engines.sync_seconds, engines.adapter_bytes, staleness,
            )  # fmt: skip
            self._kept.figures = found
            for name, value in found.as_log().items():
                self._kept.means[name].add(value)
        for listener in list(self._listeners):
            try:
                listener(found)
            except Exception:
                logger.exception("%r of the engine monitor failed and is not called again", listener)
                self._listeners.remove(listener)
        return found

    def start(self) -> Self:
        """Look from a thread of its own; that one ends with the process."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="trlpatch-engine-monitor", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set() and self.look() is not None:
                self._stopped.wait(self._every)
        except Exception as error:  # Ray was shut down under it, say; training goes on without figures
            logger.warning("the engine monitor ends: %s: %s", type(error).__name__, error)
        finally:
            for listener in self._listeners:
                getattr(listener, "close", _nothing)()

    def _one(self, index: int, health: EngineHealth | BaseException, now: float, newest: int) -> EngineFigures:
        if isinstance(health, BaseException):
            self._before.pop(index, None)
            return EngineFigures(index, "lost", reason=str(health).strip().partition("\n")[0])
        before, self._before[index] = self._before.get(index), _Before(now, health.tokens, health.steps)
        seconds = now - before.time if before else 0.0
        # An engine that took a lost one's place counts from nought again.
        known = before is not None and seconds > 0 and health.tokens >= before.tokens
        held = health.version.adapter
        return EngineFigures(
            index=index, state=health.state, waiting=health.waiting, running=health.running,
            tokens_per_s=(health.tokens - before.tokens) / seconds if known and before else 0.0,
            steps_per_s=(health.steps - before.steps) / seconds if known and before else 0.0,
            behind=max(0, newest - held) if held else 0, version=str(health.version),
            idle_s=health.seconds_since_step, reason=health.reason,
        )  # fmt: skip


def _nothing() -> None:
    """Stand in for the `close` of a listener that has none."""


class RayMetrics:
    """Put figures into Ray's metrics, each engine under a tag `engine`; a listener of an `EngineMonitor`.

    Ray exports them to Prometheus beside its own, with the prefix `ray_`.
    """

    def __init__(self, metrics: Any = None) -> None:
        """`metrics` stands in for `ray.util.metrics`."""
        if metrics is None:
            import ray.util.metrics

            metrics = ray.util.metrics
        gauge = metrics.Gauge
        tags = ("engine",)
        self._of_engine: dict[str, Any] = {
            "waiting": gauge("trlpatch_queue_depth", "Requests that wait for a rollout engine", tags),
            "running": gauge("trlpatch_running", "Requests in a rollout engine", tags),
            "tokens_per_s": gauge("trlpatch_tokens_per_s", "Tokens that a rollout engine samples per second", tags),
            "steps_per_s": gauge("trlpatch_decode_steps_per_s", "Decoding steps of a rollout engine per second", tags),
            "behind": gauge("trlpatch_versions_behind", "Adapter versions behind the one that was sent last", tags),
            "answers": gauge("trlpatch_engine_alive", "1 while a rollout engine can be asked", tags),
        }
        self._staleness = gauge("trlpatch_staleness", "Versions that trained samples were behind")
        self._sync = metrics.Histogram(
            "trlpatch_sync_ms",
            "Milliseconds that an adapter took to every engine",
            [3, 10, 30, 100, 300, 1000, 10_000],
        )
        self._sync_bytes = gauge("trlpatch_sync_bytes", "Bytes of the adapter that was sent last")
        self._syncs = 0

    def __call__(self, figures: Figures) -> None:
        """Take what a look found."""
        for engine in figures.engines:
            for name, metric in self._of_engine.items():
                metric.set(float(getattr(engine, name)), {"engine": str(engine.index)})
        if figures.syncs != self._syncs:  # of several between two looks only the last one's time is known
            self._syncs = figures.syncs
            self._sync.observe(figures.sync_s * 1e3)
            self._sync_bytes.set(float(figures.sync_bytes))
        if figures.staleness is not None:
            self._staleness.set(figures.staleness)


def log_with(trainer: Any, monitor: EngineMonitor) -> None:
    """Have a transformers trainer log what the monitor sees: means since the log before, under `ray/`.

    The callback is the first to see a log, so that all that report (Weights & Biases, TensorBoard, the console) have
    it, and `trainer.state.log_history`, too.
    """
    from transformers import TrainerCallback

    class LogsEngines(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs is None or any(name.startswith("eval_") for name in logs):
                return
            if isinstance(behind := logs.get(_OFF_POLICY), int | float):
                monitor.observe_staleness(behind)
            seen = monitor.take()
            logs.update(seen)
            if state.log_history:
                state.log_history[-1].update(seen)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            monitor.stop()

    handler = trainer.callback_handler
    handler.add_callback(LogsEngines())
    handler.callbacks.insert(0, handler.callbacks.pop())
