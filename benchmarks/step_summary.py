"""From the events of one way to its row, and from rows to a Markdown table."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.step_timers import PARTS, TRAINING
from benchmarks.step_ways import Order, Way

COMPARED = ("step_s", "generation_s", "sync_s", "training_s", "old_logps_s", "allocated_gib", "device_gib")
"""What has a ratio to the first way."""


def summary(way: Way, order: Order, events: list[dict[str, Any]], used: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the medians of one way, and all values that they come from; what was not reached is absent."""
    found: dict[str, Any] = {"way": way.spec}
    steps = [event for event in events if event["event"] == "step"]
    logs = [event for event in events if event["event"] == "log" and event["number"] > order.warmup]
    for event in events:
        if event["event"] == "loaded":
            found["load_s"] = {name: round(seconds, 2) for name, seconds in event["seconds"].items()}
            trained = [gib for when, gib in used if when >= event["time"]]
            if trained:
                found["device_gib"] = round(max(trained), 2)
        if event["event"] == "done":
            found |= {name: event[name] for name in ("device", "versions", "checkpointing")}
    timed = [step["seconds"] for step in steps if step["phase"] == "timed"]
    if timed:
        found["step_s"] = round(median(timed), 4)
        found["step_range_s"] = [round(min(timed), 4), round(max(timed), 4)]
    in_parts = [step["parts"] for step in steps if step["phase"] == "parts"]
    if in_parts:
        parts = {name: median(step[name] for step in in_parts) for name in PARTS if name in in_parts[0]}
        found["parts_s"] = {name: round(seconds, 5) for name, seconds in parts.items()}
        for name in ("generation", "sync", "check", "sleep", "old_logps"):
            if name in parts:
                found[f"{name}_s"] = round(parts[name], 5)
        found["training_s"] = round(median(sum(step.get(name, 0.0) for name in TRAINING) for step in in_parts), 4)
    peaks = [step["allocated_gib"] for step in steps if "allocated_gib" in step and step["phase"] != "warmup"]
    if peaks:
        found["allocated_gib"] = round(max(peaks), 2)
    for name in ("logp_difference", "completion_length"):
        values = [log[name] for log in logs if name in log]
        if values:
            found[name] = median(values)
            found[f"{name}_range"] = [min(values), max(values)]
    found["steps"] = [{name: step[name] for name in step if name not in ("event", "time")} for step in steps]
    return found


def add_ratios(results: list[dict[str, Any]]) -> None:
    """Give every result its ratios to the first, where both have the figure."""
    for result in results:
        result["ratios"] = {
            name: round(result[name] / results[0][name], 3)
            for name in COMPARED
            if name in result and results[0].get(name)
        }


def table(document: dict[str, Any]) -> str:
    """Return the results as a Markdown table, the settings above it."""
    settings, results = document["settings"], document["results"]
    versions: dict[str, str] = next((result["versions"] for result in results if "versions" in result), {})
    device = next((result["device"] for result in results if "device" in result), "?")
    about = (
        f"{document['date']}, {device}, {document['shape']}, r={settings['rank']}, {settings['completions']} "
        f"completions x {settings['tokens']} tokens, per device {settings['per_device']}, sleep "
        f"{'on' if settings['sleep'] else 'off'}, utilization {settings['utilization']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + (f"; {document['gpus']} ways at once, a device each" if document.get("gpus", 1) > 1 else "")
    )
    columns = (
        "way", "step s", "generation s", "sync ms", "check ms", "sleep ms", "old logps s", "training s",
        "allocated GiB", "device GiB", "load s", "length", "logp difference",
    )  # fmt: skip
    names, shared = labels(results)
    rows = [columns, tuple("---" for _ in columns)]
    rows += [(name, *_row(result)) for name, result in zip(names, results, strict=True)]
    errors = [f"{result['way']}: {result['error']}" for result in results if "error" in result]
    if shared:
        about += f"; all with {' '.join(shared)}"
    return "\n".join([about, "", *(f"| {' | '.join(row)} |" for row in rows), *errors])


def labels(results: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Name the ways without the options that all of them have, and return these."""
    specs = [result["way"].split("+") for result in results]
    shared = [option for option in specs[0][1:] if all(option in spec for spec in specs)] if len(specs) > 1 else []
    return ["+".join(word for word in spec if word not in shared) for spec in specs], shared


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    def figure(name: str, form: str, scale: float = 1.0) -> str:
        if name not in result:
            return ""
        ratio = result.get("ratios", {}).get(name)
        low, high = result.get(f"{name.removesuffix('_s')}_range_s", (None, None))
        spread = f" [{low:.2f}, {high:.2f}]" if low is not None else ""
        return f"{result[name] * scale:{form}}{spread}" + (f" ({ratio:.2f}x)" if ratio is not None else "")

    return (
        figure("step_s", ".3f"), figure("generation_s", ".3f"), figure("sync_s", ".1f", 1e3),
        figure("check_s", ".1f", 1e3), figure("sleep_s", ".1f", 1e3), figure("old_logps_s", ".3f"),
        figure("training_s", ".3f"), figure("allocated_gib", ".1f"), figure("device_gib", ".1f"),
        " + ".join(f"{seconds:.0f}" for seconds in result.get("load_s", {}).values()),
        figure("completion_length", ".0f"), figure("logp_difference", ".4f"),
    )  # fmt: skip
