"""From the events of bench_ray.py to its table, and into a calibration of trlpatch/scale."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.step_ways import Order
from trlpatch.scale import Calibration, predict
from trlpatch.scale.setting import SHAPES, from_json

MODES = {"colocated": "colocated", "ray": "sync", "ray-prefetch": "prefetch", "ray-async": "async", "server": "sync"}
"""Of trlpatch/scale, by way; TRL's own colocated engine is not modelled."""
PROMPT = 16
"""Tokens of the prompts of these runs, about."""


def summary(way: str, order: Order, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of one way, and all values that they come from; what was not reached is absent."""
    found: dict[str, Any] = {"way": way}
    for event in events:
        if event["event"] == "loaded":
            found["load_s"] = round(event["seconds"]["all"], 1)
        if event["event"] == "done":
            found |= {name: event[name] for name in ("device", "versions")}
    inputs = {event["name"]: event["value"] for event in events if event["event"] == "input"}
    points = [
        {name: event[name] for name in ("sequences", "tokens", "prompt", "seconds")}
        for event in events
        if event["event"] == "point"
    ]
    if inputs:
        found |= {"inputs": inputs, "points": points}
    steps = [event for event in events if event["event"] == "step"]
    timed = [step for step in steps if step["phase"] == "timed"]
    if timed:
        seconds = [step["seconds"] for step in timed]
        found["step_s"] = round(median(seconds), 4)
        found["step_range_s"] = [round(min(seconds), 4), round(max(seconds), 4)]
        for name in ("generation_s", "sync_s", "to_engines_s", "sync_bytes", "allocated_gib"):
            if values := [step[name] for step in timed if name in step]:
                found[name] = round(median(values), 5)
        # Over all of them, since an asynchronous step may end early or late.
        found["steps_per_s"] = round(len(seconds) / sum(seconds), 5)
        found["tokens_per_s"] = round(found["steps_per_s"] * order.completions * order.tokens, 1)
    logs = [event for event in events if event["event"] == "log" and event["number"] > order.warmup]
    names = {name for log in logs for name in log} - {"event", "time", "number"}
    found["logged"] = {name: median(log[name] for log in logs if name in log) for name in sorted(names)}
    found["steps"] = [{name: step[name] for name in step if name not in ("event", "time")} for step in steps]
    return found


def setting_of(document: dict[str, Any], way: str) -> dict[str, Any] | None:
    """Return the setting of trlpatch/scale that a way ran, as JSON; None for one that it does not model."""
    name, order = way.split("+")[0], document["settings"]
    if name not in MODES or document["shape"] not in SHAPES or not order["cuda"]:
        return None
    rank = order["rank"]
    return {
        "shape": document["shape"], "mode": MODES[name], "rollout_gpus": max(1, document["gpus"] - 1),
        "completions": order["completions"], "generations": order["generations"], "prompt_tokens": PROMPT,
        "lengths": order["tokens"], "rank": rank, "max_staleness": document["staleness"], "checkpointing": True,
        "sync": "server" if name == "server" else "adapter" if rank else "full-nccl",
    }  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """Return the results as a Markdown table, the settings above it."""
    order, results = document["settings"], document["results"]
    versions: dict[str, str] = next((result["versions"] for result in results if "versions" in result), {})
    device = next((result["device"] for result in results if "device" in result), "?")
    about = (
        f"{document['date']}, {document['gpus']} x {device}, {document['shape']}, r={order['rank']}, "
        f"{order['completions']} completions x {order['tokens']} tokens; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    trained = [result for result in results if "inputs" not in result]
    columns = (
        "way", "steps/s", "step s", "predicted s", "tokens/s", "generation s", "sync ms", "to engines ms",
        "logp difference",
    )  # fmt: skip
    rows = [columns, tuple("---" for _ in columns)]
    rows += [(result["way"], *_row(document, result, trained[0])) for result in trained]
    errors = [f"{result['way']}: {result['error']}" for result in results if "error" in result]
    return "\n".join([about, "", *(f"| {' | '.join(row)} |" for row in rows), *errors])


def _row(document: dict[str, Any], result: dict[str, Any], first: dict[str, Any]) -> tuple[str, ...]:
    def figure(name: str, form: str, scale: float = 1.0, *, ratio: bool = False) -> str:
        if name not in result:
            return ""
        beside = f" ({result[name] / first[name]:.2f}x)" if ratio and first.get(name) else ""
        return f"{result[name] * scale:{form}}{beside}"

    low, high = result.get("step_range_s", (None, None))
    spread = f" [{low:.2f}, {high:.2f}]" if low is not None else ""
    asked = setting_of(document, result["way"])
    predicted = f"{predict(from_json(asked)).step_s:.2f}" if asked else ""
    difference = result.get("logged", {}).get("sampling/sampling_logp_difference/mean")
    return (
        figure("steps_per_s", ".3f", ratio=True), figure("step_s", ".3f") + spread, predicted,
        figure("tokens_per_s", ",.0f", ratio=True), figure("generation_s", ".3f"), figure("sync_s", ".1f", 1e3),
        figure("to_engines_s", ".1f", 1e3), "" if difference is None else f"{difference:.4f}",
    )  # fmt: skip


def calibrate(calibration: dict[str, Any], documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Put what runs measured into a calibration, as `json.loads` returned it.

    Inputs and the curve of batch sizes come from the way `probe`; whole steps become checks, from which no input is
    taken: what the model predicts stands beside them in docs/scaling.md.

    Raises:
        ValueError: a run was made on a CPU, whose seconds say nothing of GPUs.
    """
    made: dict[str, Any] = {**calibration, "inputs": dict(calibration["inputs"])}
    checks = {check["name"]: check for check in calibration["checks"]}
    for document in documents:
        if not document["settings"]["cuda"]:
            raise ValueError(f"{document['command']}: ran on a CPU; expected a run on GPUs")
        for result in document["results"]:
            source = f"{document['date']}, {result.get('device', '?')}: {document['command']}"
            for name, value in result.get("inputs", {}).items():
                made["inputs"][name] = {**made["inputs"][name], "value": value, "basis": "measured", "source": source}
            if points := result.get("points"):
                made["device"] = result.get("device", made["device"])
                made["generation_points"] = [{**point, "basis": "measured", "source": source} for point in points]
            setting = setting_of(document, result["way"])
            if setting is not None and "step_s" in result:
                name = check_name(document, result["way"])
                checks[name] = {
                    "name": name, "setting": setting, "quantity": "step_s", "measured": result["step_range_s"],
                    "source": source,
                }  # fmt: skip
    made["checks"] = list(checks.values())
    Calibration.from_json(made)
    return made


def check_name(document: dict[str, Any], way: str) -> str:
    """Name a run in the calibration: a later one of the same kind takes its place."""
    order = document["settings"]
    return f"{way}, {document['shape']}, {order['completions']} x {order['tokens']}, {document['gpus']} GPUs"
