"""Show a running demo: the report, a progress bar, the reward per step, and where the patched source lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from trlpatch.console import grid, show, stdout_console
from trlpatch.demo.train import REWARD, Result, Setting, train

BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = 8


def play(steps: int, seed: int, kept: Path | None = None, *, quiet: bool) -> Result:
    """Run the demo and show it on the terminal; `quiet` shows the progress only.

    Progress is a bar, and in a file or a pipe some lines. What was trained stays in `kept`, if given.
    """
    out = stdout_console(quiet=quiet)
    err = Console(stderr=True)
    told = set() if err.is_terminal else set(milestones(steps))
    starting = err.status("importing torch and TRL, building a model", spinner="line")
    bar = Progress(
        TextColumn("GRPO"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]:.2f}"),
        TimeElapsedColumn(),
        console=err,
        disable=not err.is_terminal,
    )
    task = bar.add_task("steps", total=steps, reward=0.0, start=False)

    def on_start(setting: Setting) -> None:
        starting.stop()
        _introduce(out, setting)
        bar.start()
        bar.start_task(task)

    def on_step(step: int, reward: float) -> None:
        bar.update(task, completed=step, reward=reward)
        if step in told:
            err.print(f"step {step} of {steps}, reward {reward:.2f}")

    starting.start()
    if told:
        err.print("importing torch and TRL, building a model: a minute where nothing of it was read before")
    try:
        result = train(steps, seed, on_start, on_step, kept)
    finally:
        starting.stop()
        bar.stop()
    _conclude(out, result)
    if kept is not None:
        adapter, merged = kept / "adapter", kept / "merged"
        show("Export it:", f"  trlpatch export merged {adapter} --out {merged}", console=out)
    return result


def as_dict(result: Result) -> dict[str, Any]:
    """Return a result as JSON-able values."""
    return {
        "rollouts": result.setting.rollouts,
        "versions": result.setting.versions,
        "trainable_parameters": result.setting.trainable,
        "reward": REWARD,
        "rewards": list(result.rewards),
        "seconds": round(result.seconds, 2),
        "report": result.setting.report.to_dict(),
    }


def sparkline(values: Sequence[float], top: float = 1.0) -> str:
    """Return one block per value, its height between 0 and `top`."""
    last = len(BLOCKS) - 1
    return "".join(BLOCKS[min(last, max(0, round(value / top * last)))] for value in values)


def milestones(count: int, columns: int = COLUMNS) -> list[int]:
    """Return up to `columns` step numbers from 1 to `count`, evenly spread, first and last included."""
    if count <= columns:
        return list(range(1, count + 1))
    return sorted({1 + round(index * (count - 1) / (columns - 1)) for index in range(columns)})


def _introduce(out: Console, setting: Setting) -> None:
    facts = {
        "installed": ", ".join(f"{name} {version}" for name, version in setting.versions.items()),
        "adapter": f"{setting.trainable:,} trainable parameters",
        "rollouts": setting.rollouts,
        "reward": REWARD,
    }
    title = Text("GRPO with LoRA on a model of 2 layers and random weights", "bold")
    show(title, grid(facts.items(), indent=2), "", setting.report, "", console=out)


def _conclude(out: Console, result: Result) -> None:
    rewards = result.rewards
    if rewards:
        steps = milestones(len(rewards))
        change = Text(f"{rewards[0]:.2f} -> {rewards[-1]:.2f}", "bold")
        show(
            "",
            f"reward per step  {sparkline(rewards)}",
            grid([["step", *map(str, steps)], ["reward", *(f"{rewards[step - 1]:.2f}" for step in steps)]]),
            Text.assemble(change, f" in {len(rewards)} steps, {result.seconds:.0f} s"),
            "",
            console=out,
        )
    files = result.setting.report.files
    width = max(map(len, files), default=0)
    show(
        "The patched source that ran:",
        *(f"  {target:{width}}  {file}" for target, file in files.items()),
        f"What was changed in it: trlpatch diff {' '.join(files)}",
        console=out,
    )
