"""scale: how many rollout GPUs a training run wants, from a model of a step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trlpatch.cli.common import json_option, print_json

if TYPE_CHECKING:
    from trlpatch.scale import Advice, Prediction, Setting

MODES = ("colocated", "sync", "prefetch", "async")
SYNCS = ("adapter", "full-nccl", "full-objects", "server")


@click.command(short_help="Say how many rollout GPUs a training run wants.")
@click.option("--shape", default="7b", show_default=True, help="1.5b, 7b, 32b or 72b; measured is 7b.")
@click.option("--mode", type=click.Choice(MODES), default="async", show_default=True)
@click.option("--trainer-gpus", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rollout-gpus", type=click.IntRange(1), help="Predict this number, and simulate it.")
@click.option("--gpus", type=click.IntRange(1), help="Divide so many between trainer and engines.")
@click.option("--most", type=click.IntRange(1), default=512, show_default=True, help="Rollout GPUs to look at.")
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, show_default=True, help="GPUs of an engine.")
@click.option("--completions", type=click.IntRange(1), default=64, show_default=True, help="Of one optimizer step.")
@click.option("--generations", type=click.IntRange(1), default=8, show_default=True, help="Of one prompt.")
@click.option("--prompt-tokens", type=click.IntRange(0), default=64, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=1024, show_default=True, help="Of every completion.")
@click.option("--median", type=click.FloatRange(0, min_open=True), help="Log-normal lengths, cut at --tokens.")
@click.option(
    "--sigma", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="With --median."
)
@click.option(
    "--lengths",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with lengths that were seen, numbers between blanks.",
)
@click.option("--max-staleness", type=click.IntRange(0), default=4, show_default=True)
@click.option("--rank", type=click.IntRange(0), default=16, show_default=True, help="Of the adapter; 0: all weights.")
@click.option("--sync", type=click.Choice(SYNCS), help="By default the adapter, with --rank 0 full-nccl.")
@click.option("--checkpointing/--no-checkpointing", default=False, show_default=True)
@click.option("--reuse-old-logps", is_flag=True, help="As PatchFastRL(old_logps='reuse').")
@click.option("--packed", is_flag=True, help="The trainer computes on no padding; async never does.")
@click.option("--max-num-seqs", type=click.IntRange(1), default=256, show_default=True)
@click.option("--reward-seconds", type=click.FloatRange(0), default=0.0, show_default=True, help="Of a step.")
@click.option(
    "--calibration", type=click.Path(dir_okay=False, path_type=Path), help="File of benchmarks/bench_ray.py."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the simulated lengths.")
@json_option
def scale(
    shape: str,
    rollout_gpus: int | None,
    gpus: int | None,
    most: int,
    tokens: int,
    median: float | None,
    sigma: float,
    lengths: Path | None,
    sync: str | None,
    checkpointing: bool,
    reuse_old_logps: bool,
    packed: bool,
    reward_seconds: float,
    calibration: Path | None,
    seed: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Say how many rollout GPUs a training run wants, and where more of them stop paying.

    A model of a step (docs/scaling.md): generation, training, weight sync and staleness. It needs neither GPU nor Ray.
    Without --rollout-gpus and --gpus it looks at every number of rollout GPUs.
    """
    from trlpatch.scale import Calibration, advise, simulate, split
    from trlpatch.scale.closed_form import predict
    from trlpatch.scale.setting import Setting, lengths_of, shape_of

    if rollout_gpus is not None and gpus is not None:
        raise click.UsageError("--rollout-gpus and --gpus: expected one of them")
    known = Calibration.load(calibration) if calibration else Calibration.load()
    drawn = {"median": median, "sigma": sigma, "limit": tokens} if median else tokens
    seen = _numbers(lengths) if lengths else None
    way: Any = sync or ("adapter" if given["rank"] else "full-nccl")
    setting = Setting(
        shape=shape_of(shape), lengths=lengths_of(drawn if seen is None else seen), checkpointing=checkpointing,
        old_logps="reused" if reuse_old_logps else "computed", padded=False if packed else None,
        sync=way, reward_s=reward_seconds,
        rollout_gpus=rollout_gpus or given["tensor_parallel"], **given,
    )  # fmt: skip
    if rollout_gpus is None and gpus is None and setting.mode != "colocated":
        advice = advise(setting, known, most=most)
        print_json(_advice_as_json(setting, advice)) if as_json else _show_advice(setting, advice)
        return
    chosen = split(setting, gpus, known) if gpus is not None else setting
    closed, simulated = predict(chosen, known), simulate(chosen, known, seed=seed)
    if as_json:
        print_json({"setting": _as_json(chosen), "closed_form": asdict(closed), "simulated": asdict(simulated)})
    else:
        _show_one(chosen, closed, simulated)


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--lengths {path}: expected whole numbers between blanks: {error}") from error


def _as_json(setting: Setting) -> dict[str, Any]:
    return {**asdict(setting), "shape": setting.shape.name, "engines": setting.engines, "gpus": setting.gpus}


def _advice_as_json(setting: Setting, advice: Advice) -> dict[str, Any]:
    looked_for = ("rollout_gpus", "engines", "gpus")
    return {
        "setting": {name: value for name, value in _as_json(setting).items() if name not in looked_for},
        "wants": advice.wants, "stops": advice.stops, "best": advice.best, "bound": advice.bound,
        "rows": [{"rollout_gpus": count, **asdict(found)} for count, found in advice.rows],
    }  # fmt: skip


def _show_advice(setting: Setting, advice: Advice) -> None:
    from rich.text import Text

    from trlpatch.console import grid, show

    head = ("rollout GPUs", "step s", "faster", "generation s", "training s", "sync ms", "tokens/s", "engines busy")
    first = advice.rows[0][1].step_s
    rows = [
        (
            str(count), f"{found.step_s:.2f}", f"{first / found.step_s:.2f}x", f"{found.generation_s:.2f}",
            f"{found.training_s:.2f}", f"{found.sync_s * 1e3:.0f}", f"{found.tokens_per_s:,.0f}",
            f"{found.engines_busy:.0%}",
        )
        for count, found in advice.rows
    ]  # fmt: skip
    show(
        _about(setting, ""),
        grid([head, *rows]),
        Text(f"wants {advice.wants} rollout GPUs: 90 % of what any number gives; then it waits for {advice.bound}"),
        Text(f"from {advice.stops} on, twice as many make steps less than 10 % faster"),
    )


def _show_one(setting: Setting, closed: Prediction, simulated: Prediction) -> None:
    from trlpatch.console import grid, show

    rows: list[tuple[str, ...]] = [("", "closed form", "simulated")]
    for label, name, scaled, unit in (
        ("step", "step_s", 1, " s"), ("generation", "generation_s", 1, " s"), ("training", "training_s", 1, " s"),
        ("weight sync", "sync_s", 1e3, " ms"), ("tokens", "tokens_per_s", 1, "/s"),
        ("engines busy", "engines_busy", 100, " %"), ("trainer busy", "trainer_busy", 100, " %"),
        ("versions behind", "staleness", 1, ""), ("dropped", "dropped", 100, " %"),
    ):  # fmt: skip
        rows.append((label, *(f"{getattr(one, name) * scaled:,.2f}{unit}" for one in (closed, simulated))))
    engines = "" if setting.mode == "colocated" else f", {setting.rollout_gpus} rollout GPUs"
    show(_about(setting, engines), grid(rows))


def _about(setting: Setting, engines: str) -> Any:
    from rich.text import Text

    staleness = f", max_staleness {setting.max_staleness}" if setting.mode == "async" else ""
    return Text(
        f"{setting.shape.name}, {setting.mode}{staleness}, {setting.trainer_gpus} trainer GPUs{engines}, "
        f"{setting.completions} completions of {setting.lengths.mean:.0f} tokens in the mean"
    )
