"""Count the places of a TRL that concern an in-process vLLM engine, with `ast` alone.

This is the second opinion on the rewriter: it shares no code with it and reads the whole package, so it also finds an
engine in a file that the target table does not know. `pytest tests/golden --golden-update` surveys a release that
tests/golden/anchors.json lacks and leaves the others as they are. By hand:

    python -m tests.golden.survey 1.16.0 [version ...]            # print the counts
    python -m tests.golden.survey --write 1.16.0 [version ...]    # and make them the expected ones
"""

from __future__ import annotations

import argparse
import ast
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

Counts = dict[str, dict[str, int]]
EXPECTED = Path(__file__).with_name("anchors.json")

NOT_IN_PROCESS = {
    "trl/scripts/vllm_serve.py": "the server's own engine, in another process",
    "trl/extras/vllm_client.py": "speaks HTTP to a server",
    "trl/generation/vllm_client.py": "speaks HTTP to a server",
    "trl/experimental/ssd/ssd_eval.py": "a stand-alone evaluation script that loads a finished model",
}

_CONSTRUCTORS = {"LLM": "engine", "SamplingParams": "sampling_params", "VLLMGeneration": "generation"}
_METHODS = {"generate": "rollout", "chat": "rollout", "sleep": "sleep", "wake_up": "wake"}
_SYNC_METHODS = {"_move_model_to_vllm", "sync_weights"}
_ENGINES = ("llm", "vllm_engine")


def survey(package: Path) -> Counts:
    """Return `{file: {kind: count}}` for the `trl` package directory `package`; files without any are left out."""
    result = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent).as_posix()
        text = path.read_text(encoding="utf-8")
        if name in NOT_IN_PROCESS or "llm" not in text.lower():
            continue
        counts = Counter(kind for node in ast.walk(ast.parse(text)) for kind in _kinds(node))
        # `sync_weights` and its like exist in clients and callbacks too; what counts is the one beside an engine call.
        if counts.keys() - {"sync"}:
            result[name] = dict(sorted(counts.items()))
    return result


def _kinds(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return ["sync"] if node.name in _SYNC_METHODS else []
    if not isinstance(node, ast.Call):
        return []
    if isinstance(node.func, ast.Name):
        return [_CONSTRUCTORS[node.func.id]] if node.func.id in _CONSTRUCTORS else []
    if not isinstance(node.func, ast.Attribute):
        return []
    method, receiver = node.func.attr, ast.unparse(node.func.value)
    if method == "load_weights" and ".state_dict()" in ast.unparse(node):
        # OnlineDPO below 0.23 has no sync method and pushes its whole state dict where it generates.
        return ["push"]
    if receiver.split(".")[-1] not in _ENGINES:
        return []
    if method == "collective_rpc":
        return ["reload"] if "reload_weights" in ast.unparse(node.args[0]) else []
    return [_METHODS[method]] if method in _METHODS else []


def dumps(counts: dict[str, Counts]) -> str:
    """Return JSON with one line per file, in the order given."""
    blocks = []
    for version, files in counts.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in files.items()]
        blocks.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def recorded(path: Path = EXPECTED) -> dict[str, Counts]:
    """Return the expected counts by release."""
    found: dict[str, Counts] = json.loads(path.read_text(encoding="utf-8"))
    return found


def record(counts: dict[str, Counts], releases: Iterable[str], path: Path = EXPECTED) -> None:
    """Make `counts` the expected ones, in the order of `releases` and of these only."""
    path.write_text(dumps({v: counts[v] for v in releases if v in counts}), encoding="utf-8", newline="\n")


def main() -> None:
    """Print, and with `--write` expect, the counts of the releases on the command line."""
    from tests.golden.sources import pinned, unpacked, wheel_cache

    parser = argparse.ArgumentParser(prog="python -m tests.golden.survey")
    parser.add_argument("--write", action="store_true", help=f"make them the expected ones, in {EXPECTED.name}")
    parser.add_argument("version", nargs="*", help="pinned releases; all, if none is named")
    arguments = parser.parse_args()
    releases = pinned()
    wanted = arguments.version or list(releases)
    if unknown := sorted(set(wanted) - releases.keys()):
        parser.error(f"{', '.join(unknown)}: not in golden/releases.toml")
    if arguments.write and os.environ.get("CI"):
        parser.error("--write is refused because CI is set: expected counts are reviewed by people")
    counts = {version: survey(unpacked(releases[version], wheel_cache()) / "trl") for version in wanted}
    print(dumps(counts), end="")
    if arguments.write:
        record(counts if counts.keys() == releases.keys() else {**recorded(), **counts}, releases)


if __name__ == "__main__":
    main()
