"""From the events of bench_ray.py to its table, and into a calibration of trlpatch/scale."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.step_ways import Order
from trlpatch.scale import Calibration, predict
from trlpatch.scale.setting import SHAPES, from_json

MODES = {"colocated": "colocated", "ray": "sync", "ray-prefetch": "prefetch", "ray-async": "async", "server": "sync"}
"""Of trlpatch/scale, by way; TRL's own colocated engine is not modelled."""
AIM_OF_MODEL = 0.1
"""How far the model of a step may be off."""
AIM_OF_ENGINES = 0.875
"""What each of several engines generates of what one does alone: four 3.5 times as much."""
PROMPT = 16
"""Tokens of the prompts of these runs, about."""


def summary(way: str, order: Order, ranks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians of one way, of its first trainer; what was not reached is absent.

    Tokens per second are of all trainers; those of engines, memory and gaps are of every trainer and every engine.
    """
    found: dict[str, Any] = {"way": way}
    events = ranks[0]
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
        if counts := [event["engines"] for event in events if event["event"] == "point" and "engines" in event]:
            found["engines"] = counts[0]
    steps = [event for event in events if event["event"] == "step"]
    timed = [step for step in steps if step["phase"] == "timed"]
    if timed:
        seconds = [step["seconds"] for step in timed]
        found["step_s"] = round(median(seconds), 4)
        found["step_range_s"] = [round(min(seconds), 4), round(max(seconds), 4)]
        for name in ("cpu_s", "generation_s", "sync_s", "to_engines_s", "sync_bytes", "allocated_gib"):
            if values := [step[name] for step in timed if name in step]:
                found[name] = round(median(values), 5)
        # Over all of them, since an asynchronous step may end early or late.
        found["steps_per_s"] = round(len(seconds) / sum(seconds), 5)
        found["tokens_per_s"] = round(found["steps_per_s"] * len(ranks) * order.completions * order.tokens, 1)
        found["engine_tokens_per_s"] = [rate for rank in ranks for rate in _rates(rank)]
    found |= _held(ranks) | _apart(ranks)
    logs = [event for event in events if event["event"] == "log" and event["number"] > order.warmup]
    names = {name for log in logs for name in log} - {"event", "time", "number"}
    found["logged"] = {name: median(log[name] for log in logs if name in log) for name in sorted(names)}
    found["steps"] = [{name: step[name] for name in step if name not in ("event", "time")} for step in steps]
    return found


def _rates(events: list[dict[str, Any]]) -> list[float]:
    """Tokens per second of each engine of a trainer over the timed steps."""
    timed = [event for event in events if event["event"] == "step" and event["phase"] == "timed"]
    counts = [step["engine_tokens"] for step in timed if "engine_tokens" in step]
    seconds = sum(step["seconds"] for step in timed)
    return [round(sum(tokens) / seconds, 1) for tokens in zip(*counts, strict=True)]


def _held(ranks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """GiB that each trainer and each engine of its own has held at most."""
    ended = [event for events in ranks for event in events if event["event"] == "memory"]
    found = {
        "trainer_gib": [round(event["peak_gib"], 3) for event in ended if "peak_gib" in event],
        "engine_gib": [round(one, 3) for event in ended for one in event.get("engines_gib", ())],
    }
    return {name: values for name, values in found.items() if values}


def _apart(ranks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The largest gap of all trainers, and the smallest control."""
    taken = [event for events in ranks for event in events if event["event"] == "policy_gap"]
    if not taken:
        return {}
    found = {"gap": round(max(event["nats"] for event in taken), 8)}
    if controls := [event["control"] for event in taken if "control" in event]:
        found["control"] = round(min(controls), 8)
    return found


def setting_of(document: dict[str, Any], way: str) -> dict[str, Any] | None:
    """Return the setting of trlpatch/scale that a way ran, as JSON; None for one that it does not model."""
    name, order = way.split("+")[0], document["settings"]
    if name not in MODES or document["shape"] not in SHAPES or not order["cuda"]:
        return None
    rank, trainers = order["rank"], document.get("trainers", 1)
    several = {"trainer_gpus": trainers} if trainers > 1 else {}
    return {
        "shape": document["shape"], "mode": MODES[name], "rollout_gpus": max(1, document["gpus"] - trainers),
        **several, "completions": order["completions"] * trainers, "generations": order["generations"],
        "prompt_tokens": PROMPT,
        "lengths": order["tokens"], "rank": rank, "max_staleness": document["staleness"], "checkpointing": True,
        "sync": "server" if name == "server" else "adapter" if rank else "full-nccl",
    }  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """Return the results as a Markdown table, the settings above it."""
    order, results = document["settings"], document["results"]
    versions: dict[str, str] = next((result["versions"] for result in results if "versions" in result), {})
    device = next((result["device"] for result in results if "device" in result), "?")
    trainers = document.get("trainers", 1)
    about = (
        f"{document['date']}, {document['gpus']} x {device}, {trainers} for training, {document['shape']}, "
        f"r={order['rank']}, {order['completions']} completions x {order['tokens']} tokens a trainer; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    trained = [result for result in results if "inputs" not in result]
    columns = (
        "way", "steps/s", "step s", "cpu s", "predicted s", "tokens/s", "tokens/s an engine", "generation s",
        "sync ms", "to engines ms", "GiB a trainer", "GiB an engine", "logp difference", "gap", "control",
    )  # fmt: skip
    rows = [columns, tuple("---" for _ in columns)]
    rows += [(result["way"], *_row(document, result, trained[0])) for result in trained]
    lines = [about, "", *(f"| {' | '.join(row)} |" for row in rows), "", *_generation(results)]
    lines += [
        f"{aim['what']}: {aim['found']} (aim {aim['aim']}): {'met' if aim['met'] else 'missed'}"
        for aim in document.get("aims", [])
    ]
    return "\n".join([*lines, *(f"{result['way']}: {result['error']}" for result in results if "error" in result)])


def _generation(results: list[dict[str, Any]]) -> list[str]:
    """The table of what engines alone generate; empty where nobody probed."""
    rows = [
        (result["way"], str(engines), f"{engines * point['sequences']} x {point['tokens']}", f"{point['seconds']:.3f}",
         f"{_per_second(point, engines):,.0f}", f"{_per_second(point, 1):,.0f}")
        for result in results
        if (engines := result.get("engines"))
        for point in result["points"]
    ]  # fmt: skip
    head = ("way", "engines", "completions", "generation s", "tokens/s", "tokens/s an engine")
    found = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return [*found, ""] if rows else []


def _per_second(point: dict[str, Any], engines: int) -> float:
    return float(point["sequences"] * engines * point["tokens"] / point["seconds"])


def aims(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was aimed at and what was found: of several engines beside one, and of the model of a step."""
    found = []
    probes = {result["engines"]: result for result in document["results"] if result.get("engines")}
    for engines, result in probes.items():
        if engines == 1 or 1 not in probes:
            continue
        for point, alone in zip(result["points"], probes[1]["points"], strict=False):
            ratio = round(_per_second(point, engines) / _per_second(alone, 1), 3)
            least = round(AIM_OF_ENGINES * engines, 2)
            what = f"{engines} engines, {point['sequences']} x {point['tokens']} on each: tokens/s, of one engine's"
            found.append({"what": what, "aim": f"at least {least}", "found": ratio, "met": ratio >= least})
    for result in document["results"]:
        setting = setting_of(document, result["way"])
        if setting is not None and "step_s" in result:
            off = round(predict(from_json(setting)).step_s / result["step_s"] - 1, 3)
            what = f"{result['way']}: predicted step, off by"
            aim = f"at most {AIM_OF_MODEL}"
            found.append({"what": what, "aim": aim, "found": off, "met": abs(off) <= AIM_OF_MODEL})
    return found


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
        figure("steps_per_s", ".3f", ratio=True), figure("step_s", ".3f") + spread, figure("cpu_s", ".3f"), predicted,
        figure("tokens_per_s", ",.0f", ratio=True), _range(result, "engine_tokens_per_s", ",.0f"),
        figure("generation_s", ".3f"), figure("sync_s", ".1f", 1e3), figure("to_engines_s", ".1f", 1e3),
        _range(result, "trainer_gib", ".2f"), _range(result, "engine_gib", ".2f"),
        "" if difference is None else f"{difference:.2g}", figure("gap", ".2g"), figure("control", ".2g"),
    )  # fmt: skip


def _range(result: dict[str, Any], name: str, form: str) -> str:
    """Of several the least and the most."""
    values = result.get(name) or []
    return " to ".join(f"{value:{form}}" for value in dict.fromkeys([min(values), max(values)])) if values else ""


def calibrate(calibration: dict[str, Any], documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Put what runs measured into a calibration, as `json.loads` returned it.

    Inputs and the curve of batch sizes, of one engine alone, come from the way `probe`; whole steps become checks,
    from which no input is taken: what the model predicts stands beside them in docs/scaling.md.

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
            if (points := result.get("points")) and result.get("engines", 1) == 1:
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
    order, trainers = document["settings"], document.get("trainers", 1)
    gpus = f"{document['gpus']} GPUs" if trainers == 1 else f"{trainers} + {document['gpus'] - trainers} GPUs"
    return f"{way}, {document['shape']}, {order['completions'] * trainers} x {order['tokens']}, {gpus}"
