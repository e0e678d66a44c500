"""Tested combinations of versions: a summary of docs/matrix.json, written by `python -m tests.matrix`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

FILE = "tested.json"


@dataclass(frozen=True)
class TestedRun:
    """Runs of one TRL release on one stack.

    Attributes:
        device: "gpu" or "cpu".
        passed, failed: cases such as `grpo-lora`, with trlpatch. In those that passed, every rollout came from the
            policy.
        date: ISO day of the newest of them.
    """

    trl: str
    vllm: str
    transformers: str
    device: str
    passed: tuple[str, ...]
    failed: tuple[str, ...]
    date: str


def load() -> tuple[TestedRun, ...]:
    """Return every tested run."""
    entries = json.loads((files(__package__) / FILE).read_text(encoding="utf-8"))
    return tuple(
        TestedRun(**{**entry, "passed": tuple(entry["passed"]), "failed": tuple(entry["failed"])}) for entry in entries
    )
