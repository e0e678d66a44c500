"""From the events of the ranks of bench_ranks.py to its table, and to what was aimed at."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks.ranks_ways import Case
from benchmarks.step_ways import Order

AIMS = (
    ("DDP: step of two ranks, of one rank's", "step_s", "ddp-2", "ddp-1", 1.1),
    ("FSDP2: peak during a hand-over, of stock's", "peak_gib", "fsdp2-trlpatch", "fsdp2-stock", 0.6),
    ("FSDP2: rise during a hand-over, of stock's", "rise_gib", "fsdp2-trlpatch", "fsdp2-stock", 0.6),
    ("FSDP2: hand-over in ms", "hand_over_ms", "fsdp2-trlpatch", None, 50.0),
    ("ZeRO-3: peak during a hand-over, of stock's", "peak_gib", "zero3-trlpatch", "zero3-stock", 0.6),
    ("ZeRO-3: rise during a hand-over, of stock's", "rise_gib", "zero3-trlpatch", "zero3-stock", 0.6),
    ("ZeRO-3: hand-over in ms", "hand_over_ms", "zero3-trlpatch", None, 50.0),
    ("TP 2: seconds with the adapter, of one GPU's", "adapter_s", "tp-2", "tp-1", round(1 / 1.5, 4)),
    ("TP 2: seconds without adapter, of one GPU's", "base_s", "tp-2", "tp-1", round(1 / 1.5, 4)),
)
"""What, figure, case, the case that it is divided by, and the most that it may be."""


def summary(case: Case, order: Order, ranks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures of one case, and every value that they come from; what was not reached is absent."""
    found: dict[str, Any] = {"case": case.name}
    first = ranks[0]
    for event in first:
        if event["event"] == "loaded":
            found["load_s"] = round(event["seconds"]["all"], 1)
        elif event["event"] == "done":
            found |= {name: event[name] for name in ("device", "versions")}
        elif event["event"] == "engines":
            found["engines"] = event["found"]
        elif event["event"] == "gap":
            found[f"{event['what']}_gap"] = round(event["nats"], 8)
    if seconds := [event["seconds"] for event in _of(first, "step") if event["phase"] == "timed"]:
        found["step_s"] = round(median(seconds), 4)
        found["step_range_s"] = [round(min(seconds), 4), round(max(seconds), 4)]
    for what in ("base", "adapter"):
        if seconds := [event["seconds"] for event in _of(first, "generation") if event["what"] == what]:
            found[f"{what}_s"] = round(median(seconds), 4)
    # The first hand-over makes buffers and compiles kernels.
    syncs = [_of(rank, "sync")[1:] for rank in ranks]
    if all(syncs):
        found["hand_over_ms"] = round(max(1e3 * median(one["seconds"] for one in rank) for rank in syncs), 3)
        if order.cuda:
            found["peak_gib"] = round(max(one["peak_gib"] for rank in syncs for one in rank), 3)
            found["rise_gib"] = round(max(one["peak_gib"] - one["before_gib"] for rank in syncs for one in rank), 3)
    if checks := [event["seconds"] for event in _of(first, "check")[1:]]:
        found["check_ms"] = round(1e3 * median(checks), 3)
    if logged := [event["logp_difference"] for event in _of(first, "log") if "logp_difference" in event]:
        found["logp_difference"] = round(median(logged), 8)
    sampled = [[event["tokens"] for event in _of(rank, "sampled")] for rank in ranks]
    if sampled[0]:
        found["sampled_alike"] = all(one == sampled[0] for one in sampled)
    found["ranks"] = [[{key: event[key] for key in event if key != "time"} for event in rank] for rank in ranks]
    return found


def _of(events: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def aims(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was aimed at and what was found, of the cases that have the figures."""
    by_case = {result["case"]: result for result in results}
    found = []
    for what, figure, case, other, most in AIMS:
        value = by_case.get(case, {}).get(figure)
        divisor = 1.0 if other is None else by_case.get(other, {}).get(figure)
        if value is not None and divisor:
            found.append({"what": what, "at_most": most, "found": round(value / divisor, 4)})
    return [{**aim, "met": aim["found"] <= aim["at_most"]} for aim in found]


def table(document: dict[str, Any]) -> str:
    """Return the results as a Markdown table, the settings above it and the aims below."""
    order, results = document["settings"], document["results"]
    versions: dict[str, str] = next((result["versions"] for result in results if "versions" in result), {})
    device = next((result["device"] for result in results if "device" in result), "?")
    about = (
        f"{document['date']}, 2 x {device}, ddp: {document['shapes']['ddp']}, others: {document['shapes']['tp']}, "
        f"r={order['rank']}, {order['completions']} completions x {order['tokens']} tokens a rank; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    columns = {
        "step s": "step_s", "hand-over ms": "hand_over_ms", "check ms": "check_ms", "peak GiB": "peak_gib",
        "rise GiB": "rise_gib", "generate s": "base_s", "with adapter s": "adapter_s", "load s": "load_s",
    }  # fmt: skip
    rows = [("case", *columns, "logp difference"), ("---",) * (len(columns) + 2)]
    for result in results:
        gap = result.get("logp_difference", result.get("adapter_gap", ""))
        rows.append((result["case"], *(str(result.get(name, "")) for name in columns.values()), str(gap)))
    lines = [about, "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [
        f"{aim['what']}: {aim['found']} (at most {aim['at_most']}): {'met' if aim['met'] else 'missed'}"
        for aim in document.get("aims", [])
    ]
    return "\n".join([*lines, *(f"{result['case']}: {result['error']}" for result in results if "error" in result)])
