"""From the events of the ranks of bench_ranks.py to its table, and to what was aimed at."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks.ranks_ways import Case
from benchmarks.step_ways import Order

DDP_STEP = {2: 1.1}
"""The most that a step of so many ranks may take of one rank's, at the same batch on each; else DDP_STEP_OTHERS."""
DDP_STEP_OTHERS = 1.15
TP_SECONDS = {2: round(1 / 1.5, 4)}
"""The most that generation over so many ranks may take of one GPU's."""
OF_STOCK, HAND_OVER_MS = 0.6, 50.0
"""Of a sharded hand-over: memory by stock's, and milliseconds."""


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
            found["control" if event["what"] == "control" else f"{event['what']}_gap"] = round(event["nats"], 8)
    timed = [event for event in _of(first, "step") if event["phase"] == "timed"]
    if cores := [event["cpu_s"] for event in timed if "cpu_s" in event]:
        found["cpu_s"] = round(median(cores), 4)
    if seconds := [event["seconds"] for event in timed]:
        found["step_s"] = round(median(seconds), 4)
        found["step_range_s"] = [round(min(seconds), 4), round(max(seconds), 4)]
    for what in ("base", "adapter"):
        if calls := [event for event in _of(first, "generation") if event["what"] == what]:
            found[f"{what}_s"] = round(median(call["seconds"] for call in calls), 4)
            found["engine_tokens_per_s"] = [round(median(call["tokens"] / call["seconds"] for call in calls), 1)]
    if rates := _rates(case, ranks):
        found["engine_tokens_per_s"] = rates
    # The first hand-over makes buffers and compiles kernels.
    syncs = [_of(_trained(rank), "sync")[1:] for rank in ranks]
    if all(syncs):
        found["hand_over_ms"] = round(max(1e3 * median(one["seconds"] for one in rank) for rank in syncs), 3)
        if all("peak_gib" in one for rank in syncs for one in rank):
            found["peak_gib"] = round(max(one["peak_gib"] for rank in syncs for one in rank), 3)
            found["rise_gib"] = round(max(one["peak_gib"] - one["before_gib"] for rank in syncs for one in rank), 3)
    if checks := [event["seconds"] for event in _of(_trained(first), "check")[1:]]:
        found["check_ms"] = round(1e3 * median(checks), 3)
    if logged := [event["logp_difference"] for event in _of(first, "log") if "logp_difference" in event]:
        found["logp_difference"] = round(median(logged), 8)
    gaps = [event for rank in ranks for event in _of(rank, "policy_gap")]
    if gaps:  # the largest gap and the smallest control of all ranks
        found["gap"] = round(max(event["nats"] for event in gaps), 8)
        if controls := [event["control"] for event in gaps if "control" in event]:
            found["control"] = round(min(controls), 8)
    if memory := [_memory(rank) for rank in ranks if _of(rank, "memory")]:
        found["memory_gib"] = memory
    sampled = [[event["tokens"] for event in _of(rank, "sampled")] for rank in ranks]
    if sampled[0]:
        found["sampled_alike"] = all(one == sampled[0] for one in sampled)
    found["ranks"] = [[{key: event[key] for key in event if key != "time"} for event in rank] for rank in ranks]
    return found


def _of(events: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def _trained(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What happened until the last step had ended: afterwards the gap is taken."""
    steps = [place for place, event in enumerate(events) if event["event"] == "step"]
    return events[: steps[-1]] if steps else events


def _rates(case: Case, ranks: list[list[dict[str, Any]]]) -> list[float]:
    """Tokens per second of each engine while it generates, the warm-up's calls left out; all ranks of one say it."""
    found = []
    for events in ranks[:1] if case.part in ("tp", "grpotp") else ranks:
        trained = _trained(events)
        warm = [place for place, event in enumerate(trained) if event.get("phase") == "warmup"]
        if calls := _of(trained[warm[-1] :] if warm else trained, "rollout"):
            found.append(round(median(call["tokens"] / call["seconds"] for call in calls), 1))
    return found


def _memory(events: list[dict[str, Any]]) -> float:
    """The most that a rank has held: torch's allocator, engine included, or on a CPU its resident set."""
    names = {"step": ("allocated_gib",), "sync": ("until_gib", "peak_gib"), "memory": ("peak_gib",)}
    held: list[float] = [event[name] for event in events for name in names.get(event["event"], ()) if name in event]
    return round(max(held), 3)


def aims(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was aimed at and what was found, of the cases that have the figures."""
    by_case = {result["case"]: result for result in results}
    found = []
    for what, figure, case, other, most in _aims_of(by_case):
        value = by_case[case].get(figure)
        divisor = 1.0 if other is None else by_case.get(other, {}).get(figure)
        if value is not None and divisor:
            found.append({"what": what, "at_most": most, "found": round(value / divisor, 4)})
    return [{**aim, "met": aim["found"] <= aim["at_most"]} for aim in found]


def _aims_of(names: Iterable[str]) -> Iterable[tuple[str, str, str, str | None, float]]:
    """Yield what, figure, case, the case that it is divided by, and the most that it may be."""
    for name in names:
        case = Case.named(name, "")
        if case.way == "stock" or case.ranks == 1:
            continue
        one, stock = f"{case.part}-trlpatch-1", f"{case.part}-stock-{case.ranks}"
        if case.part == "ddp":
            most = DDP_STEP.get(case.ranks, DDP_STEP_OTHERS)
            yield f"DDP: step of {case.ranks} ranks, of one rank's", "step_s", name, one, most
        elif case.part in ("fsdp2", "zero3"):
            said = f"{'FSDP2' if case.part == 'fsdp2' else 'ZeRO-3'}, {case.ranks} ranks"
            yield f"{said}: peak during a hand-over, of stock's", "peak_gib", name, stock, OF_STOCK
            yield f"{said}: rise during a hand-over, of stock's", "rise_gib", name, stock, OF_STOCK
            yield f"{said}: hand-over in ms", "hand_over_ms", name, None, HAND_OVER_MS
        elif case.part == "tp" and case.ranks in TP_SECONDS:
            most = TP_SECONDS[case.ranks]
            yield f"TP {case.ranks}: seconds with the adapter, of one GPU's", "adapter_s", name, one, most
            yield f"TP {case.ranks}: seconds without adapter, of one GPU's", "base_s", name, one, most


def table(document: dict[str, Any]) -> str:
    """Return the results as a Markdown table, the settings above it and the aims below."""
    order, results = document["settings"], document["results"]
    versions: dict[str, str] = next((result["versions"] for result in results if "versions" in result), {})
    device = next((result["device"] for result in results if "device" in result), "?")
    about = (
        f"{document['date']}, {document['ranks']} x {device}, ddp: {document['shapes']['ddp']}, others: "
        f"{document['shapes']['tp']}, r={order['rank']}, {order['completions']} completions of {order['tokens']} "
        "tokens a rank; " + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    columns = {
        "step s": "step_s", "cpu s": "cpu_s", "tokens/s an engine": "engine_tokens_per_s",
        "hand-over ms": "hand_over_ms", "check ms": "check_ms", "peak GiB": "peak_gib", "rise GiB": "rise_gib",
        "GiB a rank": "memory_gib", "generate s": "base_s", "with adapter s": "adapter_s", "load s": "load_s",
    }  # fmt: skip
    rows = [("case", *columns, "logp difference", "gap", "control"), ("---",) * (len(columns) + 4)]
    for result in results:
        gap = result.get("gap", result.get("adapter_gap", ""))
        ends = (result.get("logp_difference", ""), gap, result.get("control", ""))
        shown = (*(_said(result.get(name, "")) for name in columns.values()), *map(_said, ends))
        rows.append((result["case"], *shown))
    lines = [about, "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [
        f"{aim['what']}: {aim['found']} (at most {aim['at_most']}): {'met' if aim['met'] else 'missed'}"
        for aim in document.get("aims", [])
    ]
    return "\n".join([*lines, *(f"{result['case']}: {result['error']}" for result in results if "error" in result)])


def _said(value: Any) -> str:
    """Of several ranks or engines the least and the most."""
    if isinstance(value, list):
        return f"{value[0]}" if len(value) == 1 else f"{min(value)} to {max(value)}"
    return f"{value:.2g}" if isinstance(value, float) and abs(value) < 0.001 else str(value)
