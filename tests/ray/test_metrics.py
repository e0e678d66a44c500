"""Metrics of rollout engines, without Ray: rates, versions, what a trainer logs, what is drawn."""

from __future__ import annotations

import gc
import io
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from trlpatch.errors import EngineLost, RolloutTimeout
from trlpatch.ray.messages import EngineHealth, Version
from trlpatch.ray.metrics import EngineMonitor, Figures, RayMetrics
from trlpatch.ray.progress import ProgressView, summary, table


def health(index: int, tokens: int = 0, **changes: Any) -> EngineHealth:
    given: dict[str, Any] = {
        "state": "running", "waiting": 3, "running": 5, "version": Version(2, "0"), "steps": tokens // 10,
        "seconds_since_step": 0.0, "tokens": tokens,
    }  # fmt: skip
    return EngineHealth(index, **{**given, **changes})


@dataclass(eq=False)
class Engines:
    """What a monitor asks of `RayEngines`."""

    says: list[Any]
    adapter_version: int = 2
    adapter_bytes: int = 2**20
    sync_seconds: float = 0.02
    prefetch: int = 0
    handles: list[int] = field(default_factory=lambda: [0])
    asked: threading.Event = field(default_factory=threading.Event)

    def health(self, timeout: float | None = None) -> list[EngineHealth | BaseException]:
        self.asked.set()
        if isinstance(self.says, BaseException):
            raise self.says
        return list(self.says)


def monitored(engines: Engines) -> tuple[EngineMonitor, list[float]]:
    now = [100.0]
    return EngineMonitor(engines, clock=lambda: now[0]), now


def looked(monitor: EngineMonitor) -> Figures:
    found = monitor.look()
    assert found is not None
    return found


def test_rates_are_differences_of_two_looks() -> None:
    engines = Engines([health(0, 1000), health(1, 50)])
    monitor, now = monitored(engines)
    assert looked(monitor).tokens_per_s == 0.0
    engines.says = [health(0, 3000), health(1, 150)]
    now[0] += 4.0
    found = looked(monitor)
    assert [engine.tokens_per_s for engine in found.engines] == [500.0, 25.0]
    assert found.engines[0].steps_per_s == 50.0
    assert (found.tokens_per_s, found.queue_depth, found.running, found.alive) == (525.0, 6, 10, 2)


def test_an_engine_in_the_place_of_a_lost_one_has_no_negative_rate() -> None:
    engines = Engines([health(0, 1000)])
    monitor, now = monitored(engines)
    looked(monitor)
    for says in (EngineLost("rollout engine 0 is lost\nand more"), health(0, 7), health(0, 17)):
        engines.says = [says]
        now[0] += 1.0
        found = looked(monitor)
        if isinstance(says, EngineLost):
            assert (found.alive, found.engines[0].state) == (0, "lost")
            assert found.engines[0].reason == "rollout engine 0 is lost"
    assert found.tokens_per_s == 10.0
    engines.says = [health(0, 3)]  # replaced between two looks
    assert looked(monitor).tokens_per_s == 0.0


def test_silent_engines_are_shown_as_such() -> None:
    engines = Engines([health(0), health(1)])
    monitor, _ = monitored(engines)
    looked(monitor)
    engines.says = RolloutTimeout("health: no answer of rollout engine 1 in 10 s")  # type: ignore[assignment]
    found = looked(monitor)
    assert found.alive == 0
    assert "no answer of rollout engine 1" in found.engines[1].reason


def test_an_engine_without_the_newest_adapter_is_behind_and_one_without_any_is_not() -> None:
    engines = Engines([health(0), health(1, version=Version(0, "0")), health(2, version=Version(5, "0"))])
    engines.adapter_version = 5
    monitor, _ = monitored(engines)
    assert [engine.behind for engine in looked(monitor).engines] == [3, 0, 0]
    assert monitor.take()["ray/versions_behind"] == 3.0


def test_a_trainer_logs_means_since_its_last_log() -> None:
    engines = Engines([health(0, waiting=2)])
    monitor, now = monitored(engines)
    for waiting in (2, 4):
        engines.says = [health(0, waiting=waiting)]
        now[0] += 1.0
        looked(monitor)
    taken = monitor.take()
    assert taken["ray/queue_depth"] == 3.0
    assert taken["ray/sync_ms"] == pytest.approx(20.0)
    assert taken["ray/sync_mib"] == 1.0
    assert "ray/staleness" not in taken
    assert monitor.take() == {}
    monitor.observe_staleness(2)
    looked(monitor)
    assert monitor.take()["ray/staleness"] == 2.0


def test_batches_generated_ahead_are_one_version_old_unless_somebody_knows_better() -> None:
    engines = Engines([health(0)], prefetch=1)
    monitor, _ = monitored(engines)
    assert looked(monitor).staleness == 1
    monitor.observe_staleness(0.5)
    assert looked(monitor).staleness == 0.5


def test_before_the_first_sync_there_are_no_figures_of_it() -> None:
    engines = Engines([health(0, version=Version())], adapter_version=0)
    monitor, _ = monitored(engines)
    assert not {"ray/sync_ms", "ray/sync_mib"} & set(looked(monitor).as_log())


def test_it_ends_with_the_engines_and_closes_its_listeners() -> None:
    engines = Engines([health(0)])
    closed = threading.Event()
    monitor = EngineMonitor(engines, every=0.001)

    class Listener:
        def __call__(self, figures: Figures) -> None: ...

        def close(self) -> None:
            closed.set()

    monitor.listen(Listener())
    monitor.start()
    assert engines.asked.wait(60)
    engines.handles = []  # as after shutdown()
    assert closed.wait(60)
    del engines
    gc.collect()
    assert monitor.look() is None
    monitor.stop()


def test_a_listener_that_fails_is_left_out_and_the_others_go_on() -> None:
    engines, seen = Engines([health(0)]), []
    monitor, _ = monitored(engines)

    def broken(figures: Figures) -> None:
        seen.append("broken")
        raise RuntimeError("no")

    monitor.listen(broken)
    monitor.listen(lambda figures: seen.append("sound"))
    looked(monitor)
    looked(monitor)
    assert seen == ["broken", "sound", "sound"]


def test_what_ray_raises_ends_the_monitor_and_nothing_else() -> None:
    engines = Engines([health(0)])
    monitor = EngineMonitor(engines, every=0.001)
    engines.says = ConnectionError("Ray was shut down")  # type: ignore[assignment]
    monitor.start()
    assert engines.asked.wait(60)
    monitor.stop()
    assert monitor.figures == Figures()


class _Metric:
    def __init__(self, name: str, description: str, *arguments: Any) -> None:
        self.name, self.description, self.arguments = name, description, arguments
        self.values: list[Any] = []

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values.append((value, (tags or {}).get("engine")))

    def observe(self, value: float) -> None:
        self.values.append(value)


def test_ray_gets_each_engine_under_its_tag_and_each_sync_once() -> None:
    made: dict[str, _Metric] = {}

    def make(name: str, description: str, *arguments: Any) -> _Metric:
        made[name] = _Metric(name, description, *arguments)
        return made[name]

    to_ray = RayMetrics(SimpleNamespace(Gauge=make, Histogram=make))
    engines = Engines([health(0), EngineLost("gone")])
    monitor, _ = monitored(engines)
    monitor.listen(to_ray)
    looked(monitor)
    looked(monitor)
    engines.adapter_version, engines.sync_seconds = 3, 0.5
    looked(monitor)
    assert made["trlpatch_queue_depth"].values[:2] == [(3.0, "0"), (0.0, "1")]
    assert made["trlpatch_engine_alive"].values[:2] == [(1.0, "0"), (0.0, "1")]
    assert made["trlpatch_sync_ms"].values == pytest.approx([20.0, 500.0])
    assert made["trlpatch_staleness"].values == []


def drawn(figures: Figures) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(table(figures))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_view_has_a_row_for_each_engine_and_what_they_have_in_common() -> None:
    engines = Engines(
        [health(0, version=Version(1, "0")), EngineLost("its actor has died [x]"), health(2, seconds_since_step=42.0)]
    )
    monitor, _ = monitored(engines)
    monitor.observe_staleness(1)
    text = drawn(looked(monitor))
    assert "adapter 1, weights 0, 1 behind" in text
    assert "its actor has died [x]" in text, "what an exception says is no markup"
    assert "no step for 42 s" in text
    assert summary(monitor.figures) in " ".join(text.split())
    assert summary(monitor.figures) == (
        "2 of 3 engines, 0 tokens/s, 6 waiting, last sync 20 ms, 1.0 MiB, samples 1.0 versions old"
    )


def test_the_view_is_drawn_on_a_terminal_and_taken_off_it() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    view = ProgressView(console)
    assert view.wanted
    view(Figures())
    view.close()
    view.close()
    assert not ProgressView(Console(file=io.StringIO())).wanted
