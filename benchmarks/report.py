"""The step tables and pictures of docs/performance.md, from docs/performance.json.

    python benchmarks/report.py add docs/performance.json STEP.json ...   # what bench_step.py wrote
    python benchmarks/report.py render                                    # needs matplotlib for the pictures

A document with the same command, settings and device replaces the older one; `render` fills the lines between the two
markers in docs/performance.md and leaves the rest of the page alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_summary import labels, table

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- bench_step: begin, written by benchmarks/report.py -->", "<!-- bench_step: end -->"

BARS = (
    ("generation", "generation_s"),
    ("sync, check, sleep", ("sync_s", "check_s", "sleep_s")),
    ("old log-probabilities", "old_logps_s"),
    ("training", "training_s"),
)
"""What a bar of the time picture is made of; what these leave of a whole step is drawn as the rest."""


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("store", type=Path)
    adding.add_argument("documents", type=Path, nargs="+")
    rendering = commands.add_parser("render")
    rendering.add_argument("--docs", type=Path, default=DOCS)
    rendering.add_argument("--without-pictures", action="store_true")
    given = parser.parse_args()
    if given.command == "add":
        add(given.store, [json.loads(path.read_text(encoding="utf-8")) for path in given.documents])
    else:
        render(given.docs, pictures=not given.without_pictures)
    return 0


def add(store: Path, documents: list[dict[str, Any]]) -> None:
    """Put documents into the store, over older ones of the same run."""
    kept = {_key(document): document for document in _load(store)}
    kept |= {_key(document): document for document in documents}
    text = json.dumps({"documents": list(kept.values())}, indent=1)
    store.write_text(text + "\n", encoding="utf-8")


def render(docs: Path, *, pictures: bool) -> None:
    """Write the tables into performance.md, and a picture beside it for every document.

    Raises:
        ValueError: the page has no two markers to write between.
    """
    page, documents = docs / "performance.md", _load(docs / "performance.json")
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: expected one line {BEGIN!r} and one {END!r} after it; put them back")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    sections: list[str] = []
    for number, document in enumerate(documents, 1):
        lines = [f"### {title(document)}", "", "```", document["command"], "```", "", table(document)]
        if pictures:
            name = f"performance-{number}-{slug(document)}.svg"
            draw(document, docs / name)
            lines += ["", f"![time and memory by way, {title(document)}]({name})"]
        sections.append("\n".join(lines))
    page.write_text(f"{head}{BEGIN}\n\n" + "".join(f"{part}\n\n" for part in sections) + END + tail, encoding="utf-8")


def title(document: dict[str, Any]) -> str:
    """Name a document in a heading."""
    settings = document["settings"]
    sleep = "sleep on" if settings["sleep"] else "sleep off"
    size = f"{settings['completions']} x {settings['tokens']} tokens"
    return f"{document['shape']}, {size}, r={settings['rank']}, {sleep}, {_device(document)}"


def slug(document: dict[str, Any]) -> str:
    """Name a document in a file name."""
    words = "".join(character if character.isalnum() else " " for character in title(document).lower())
    return "-".join(words.split())


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw time and memory by way, in the same bytes every time."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("svg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    matplotlib.rcParams.update({"svg.hashsalt": "trlpatch", "svg.fonttype": "none", "font.size": 9})
    results = [result for result in reversed(document["results"]) if "step_s" in result]
    names = [name.replace("+", "\n+") for name in labels(results)[0]]
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 1.2 + 0.55 * len(names)), sharey=True)
    left = [0.0] * len(names)
    for label, widths in bars(results).items():
        times.barh(names, widths, left=left, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    times.set_xlabel("seconds a step")
    times.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False)
    for at, (label, key) in enumerate(
        (("in use on the device", "device_gib"), ("allocated by torch", "allocated_gib"))
    ):
        memory.barh(names, [result.get(key, 0.0) for result in results], height=0.8 - 0.35 * at, label=label)
    memory.set_xlabel("GiB at most while training")
    memory.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def bars(results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the widths of every part, one a result; the rest is what they leave of the whole step."""
    found: dict[str, list[float]] = {}
    for label, keys in BARS:
        names = (keys,) if isinstance(keys, str) else keys
        found[label] = [sum(result.get(name, 0.0) for name in names) for result in results]
    spent = [sum(widths) for widths in zip(*found.values(), strict=True)]
    found["rest"] = [max(0.0, result["step_s"] - sum_) for result, sum_ in zip(results, spent, strict=True)]
    return found


def _load(store: Path) -> list[dict[str, Any]]:
    documents: list[dict[str, Any]] = (
        json.loads(store.read_text(encoding="utf-8"))["documents"] if store.exists() else []
    )
    return documents


def _device(document: dict[str, Any]) -> str:
    return next((result["device"] for result in document["results"] if "device" in result), "no device")


def _key(document: dict[str, Any]) -> str:
    return json.dumps([document["command"], document["settings"], _device(document)], sort_keys=True)


if __name__ == "__main__":
    sys.exit(main())
