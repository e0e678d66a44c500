"""Calibration of the model of a step: what was measured, derived and assumed, read from calibration.json.

Every input says on what it stands. A run of `benchmarks/bench_ray.py --calibrate` puts what it measured into such a
file; docs/scaling.md shows the packaged one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trlpatch.errors import CalibrationError

Basis = Literal["measured", "derived", "assumed"]

PACKAGED = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Input:
    """One number with its unit, and what it stands on."""

    value: float
    unit: str
    basis: Basis
    source: str


@dataclass(frozen=True)
class GenerationPoint:
    """Seconds that one engine took for `sequences` completions of exactly `tokens` tokens behind `prompt` tokens."""

    sequences: int
    tokens: int
    prompt: int
    seconds: float
    basis: Basis
    source: str

    @property
    def decode_step_s(self) -> float:
        """Seconds of one decoding step, on average."""
        return self.seconds / self.tokens

    @property
    def mean_context(self) -> float:
        """Tokens that a sequence attends to, on average over its decoding steps."""
        return self.prompt + self.tokens / 2


@dataclass(frozen=True)
class Check:
    """A measurement that no input was taken from: the model predicts it (`scale.predict`) and stands beside it.

    Attributes:
        name: what was run.
        setting: keyword arguments of `Setting`, as JSON holds them.
        quantity: what of a prediction is compared: `step_s`, `generation_s`, `training_s` or `sync_s`.
        measured: seconds, lowest and highest; empty until a run has filled it in.
        source: where it was measured.
    """

    name: str
    setting: dict[str, Any]
    quantity: str
    measured: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Calibration:
    """All inputs of the model, by name."""

    device: str
    inputs: dict[str, Input]
    generation_points: tuple[GenerationPoint, ...]
    checks: tuple[Check, ...] = ()

    @classmethod
    def load(cls, path: Path = PACKAGED) -> Calibration:
        """Read a calibration file.

        Raises:
            CalibrationError: it cannot be read, an input is missing or unknown, or it does not say what it stands on.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CalibrationError(path, f"cannot be read: {error}") from error
        try:
            found = cls.from_json(document)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(path, f"has another form: {type(error).__name__}: {error}") from error
        if path != PACKAGED and (wrong := set(found.inputs) ^ set(cls.load().inputs)):
            raise CalibrationError(path, f"missing or unknown: {', '.join(sorted(wrong))}")
        return found

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Calibration:
        """Read what `json.loads` returned; see `load`."""
        inputs = {name: Input(**entry) for name, entry in document["inputs"].items()}
        points = tuple(GenerationPoint(**entry) for entry in document["generation_points"])
        bases = {name: entry.basis for name, entry in inputs.items()}
        bases |= {f"generation_points[{at}]": point.basis for at, point in enumerate(points)}
        for name, basis in bases.items():
            if basis not in get_args(Basis):
                raise ValueError(f"{name}: basis {basis!r}, expected one of {', '.join(get_args(Basis))}")
        if any(one.value <= 0 for one in inputs.values()) or any(one.seconds <= 0 for one in points):
            raise ValueError("expected positive values only")
        checks = tuple(Check(**{**entry, "measured": tuple(entry["measured"])}) for entry in document["checks"])
        return cls(document["device"], inputs, points, checks)

    def __getitem__(self, name: str) -> float:
        return self.inputs[name].value


def decode_line(points: Iterable[GenerationPoint], attention_s: float) -> tuple[float, float]:
    """Fit (seconds of a decoding step, seconds more for each sequence) to `points`, least squares of relative errors.

    Args:
        points: at least two, with different numbers of sequences.
        attention_s: seconds a step takes for each token of context; taken out before the fit.

    Raises:
        ValueError: all points have the same number of sequences, or the line falls.
    """
    # Minimizes the sum of ((a + b x - y) / y)^2: the normal equations, weighted with 1 / y^2.
    rows = [
        (float(point.sequences), point.decode_step_s - attention_s * point.sequences * point.mean_context)
        for point in points
    ]
    weights = [1 / y**2 for _, y in rows]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, rows, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, rows, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, rows, strict=True))
    if not spread:
        raise ValueError("generation_points: expected at least two different numbers of sequences")
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, rows, strict=True)) / spread
    base = mean_y - slope * mean_x
    if slope < 0 or base <= 0:
        raise ValueError(f"generation_points: more sequences are faster (base {base:.2e} s, slope {slope:.2e} s)")
    return base, slope
