"""Progress view: a line for each rollout engine on a terminal, while a trainer runs.

trlpatch.ray.monitor(engines, trainer)
trainer.train()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trlpatch.ray.metrics import EVERY, EngineMonitor, Figures, RayMetrics, Watched, log_with

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLUMNS = ("engine", "state", "waiting", "running", "tokens/s", "steps/s", "samples with", "")
_COLOURS = {"running": "green", "paused": "yellow", "asleep": "yellow", "loading": "yellow"}


def monitor(
    engines: Watched, trainer: Any = None, *, every: float = EVERY, to_ray: bool = True, progress: bool | None = None
) -> EngineMonitor:
    """Watch engines from now on: figures for Ray's metrics, for the log of `trainer`, and on the terminal.

    Args:
        engines: what `create_engines` returned.
        trainer: logs the figures under `ray/`; watching ends with its training.
        every: seconds between two looks.
        to_ray: put them into Ray's metrics.
        progress: show them on stderr; by default where that is a terminal.

    Returns:
        The monitor, which runs; `stop()` ends it.
    """
    made = EngineMonitor(engines, every=every)
    if to_ray:
        made.listen(RayMetrics())
    if trainer is not None:
        log_with(trainer, made)
    view = ProgressView()
    if view.wanted if progress is None else progress:
        made.listen(view)
    return made.start()


class ProgressView:
    """Draws figures over the ones before; a listener of an `EngineMonitor`.

    What is printed meanwhile appears above. A bar of the trainer's that was there first is drawn into it:
    `disable_tqdm=True` leaves that one out.
    """

    def __init__(self, console: Console | None = None) -> None:
        """`console` stands in for stderr."""
        from rich.console import Console

        self._console = console or Console(stderr=True, highlight=False)
        self._live: Any = None

    @property
    def wanted(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self._console.is_terminal

    def __call__(self, figures: Figures) -> None:
        """Draw."""
        from rich.live import Live

        if self._live is None:
            self._live = Live(table(figures), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table(figures), refresh=True)

    def close(self) -> None:
        """Take it off the terminal."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def table(figures: Figures) -> Table:
    """Return figures as a rich table: a row for each engine, what all have in common below."""
    from rich.table import Table
    from rich.text import Text

    made = Table(*COLUMNS, box=None, pad_edge=False, caption=summary(figures), caption_justify="left")
    for column in made.columns[2:6]:
        column.justify = "right"
    for engine in figures.engines:
        colour = _COLOURS.get(engine.state, "red")
        behind = f", {engine.behind} behind" if engine.behind else ""
        note = engine.reason or (f"no step for {engine.idle_s:.0f} s" if engine.idle_s >= 10 else "")
        made.add_row(
            str(engine.index), Text(engine.state, style=colour), str(engine.waiting), str(engine.running),
            f"{engine.tokens_per_s:,.0f}", f"{engine.steps_per_s:.1f}", engine.version + behind, Text(note),
        )  # fmt: skip
    return made


def summary(figures: Figures) -> str:
    """Return what holds for all engines in one line."""
    parts = [
        f"{figures.alive} of {len(figures.engines)} engines",
        f"{figures.tokens_per_s:,.0f} tokens/s",
        f"{figures.queue_depth} waiting",
    ]
    if figures.syncs:
        parts.append(f"last sync {figures.sync_s * 1e3:.0f} ms, {figures.sync_bytes / 2**20:.1f} MiB")
    if figures.staleness is not None:
        parts.append(f"samples {figures.staleness:.1f} versions old")
    return ", ".join(parts)
