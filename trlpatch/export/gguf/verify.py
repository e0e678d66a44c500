"""Run what was written: llama.cpp on each file, transformers on the weights that went into it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trlpatch.errors import CannotExport, ExportMismatch
from trlpatch.export.gguf.checks import NO_WINDOW, architecture_of, settings_of, window_of
from trlpatch.export.gguf.converter_files import converter_files
from trlpatch.export.gguf.pipe import Child
from trlpatch.export.gguf.rows import xllamacpp_library
from trlpatch.export.gguf.weights import Weights
from trlpatch.export.space import free_memory, gib
from trlpatch.log import logger
from trlpatch.versions import pip_install

CHILD = "trlpatch.export.gguf.verify_child"

SETTINGS = "settings"
"""Name of the folder with config.json in the scratch folder of an export."""

LENGTH = 48
"""Tokens of the prompt; 16 more than a sliding window, where that is longer."""

LONGEST = 8192

EXACT = 1e-3
"""Largest difference of logits of an f32 file from transformers' in float32. Measured: 1e-5 on logits of 7."""

SPREAD = {"f16": 5e-3, "bf16": 3e-2}
"""Root mean square difference of logits, as a part of their standard deviation, from transformers with the weights
rounded as in the file: llama.cpp rounds activations to the same 16 bits. Measured: 8e-4 and 7e-3."""

SPREAD_QUANTIZED = 0.1
"""The same where activations are rounded to 8 bits. Measured: up to 0.033; the graph of another model gives 0.3."""


@dataclass(frozen=True)
class Verdict:
    """What running a file showed.

    Attributes:
        verified: llama.cpp ran it, and computes what transformers computes with the same rounded weights.
        max_diff: largest difference of these logits; None where it was not run.
        kl: mean Kullback-Leibler divergence of the file from the unrounded model, per token, in nats: what the type
            costs. None where it was not run.
        note: why it was not verified.
    """

    verified: bool
    max_diff: float | None = None
    kl: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if not self.verified:
            return f"NOT VERIFIED: {self.note}"
        return f"verified: logits within {self.max_diff:.2g} of transformers', KL {self.kl:.2g} from float32"


def verify_files(
    files: Mapping[str, Path],
    written: Mapping[str, Any],
    weights: Weights,
    scratch: Path,
    tokens: list[int],
    *,
    unwanted: str,
    report: Any,
) -> dict[str, Verdict]:
    """Run every file on the tokens, and compare; `unwanted` says why not.

    Raises:
        ExportMismatch: llama.cpp does not load a file, or computes something else than transformers.
    """
    why = unwanted or _impossible(weights)
    if why:
        logger.warning("GGUF: not verified: %s", why)
        return dict.fromkeys(files, Verdict(False, note=why))
    return _Verification(files, written, weights, scratch, tokens, report).verdicts()


def _impossible(weights: Weights) -> str:
    if xllamacpp_library() is None:
        return f"xllamacpp is not installed, so no llama.cpp can run the file; {pip_install('gguf')}"
    size = 4 * sum(_count(shape) for shape in weights.shapes.values())
    # transformers holds the weights in float32, and for a moment the largest of them twice.
    need, free = int(size * 1.3) + (1 << 30), free_memory()
    if need > free:
        return f"transformers needs {gib(need)} of memory for the reference in float32, and {gib(free)} are free"
    return ""


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class _Verification:
    def __init__(
        self,
        files: Mapping[str, Path],
        written: Mapping[str, Any],
        weights: Weights,
        scratch: Path,
        tokens: list[int],
        report: Any,
    ) -> None:
        self.files, self.written, self.weights = files, written, weights
        self.scratch, self.tokens, self.report = scratch, tokens, report

    def verdicts(self) -> dict[str, Verdict]:
        """Each file's."""
        tools = converter_files()
        with Child(CHILD, [tools / "gguf-py"], what="computing the reference with transformers") as self.transformers:
            return self._verdicts()

    def _verdicts(self) -> dict[str, Verdict]:
        exact = self._reference({})
        if isinstance(exact, str):
            return {name: Verdict(False, note=exact) for name in self.files}
        verdicts = {}
        for done, (name, path) in enumerate(self.files.items()):
            self.report("running the files", done, len(self.files))
            verdicts[name] = self._verdict(name, path, exact)
            if not verdicts[name].verified:
                logger.warning("GGUF: %s is not verified: %s", name, verdicts[name].note)
        self.report("running the files", len(self.files), len(self.files))
        return verdicts

    def _verdict(self, name: str, path: Path, exact: Any) -> Verdict:
        rounding, unlike = self._rounding(name)
        ours = self._llama(path)
        if isinstance(ours, str):
            return Verdict(False, note=ours)
        if ours.shape != exact.shape:
            if ours.shape[1] < exact.shape[1]:
                raise ExportMismatch(
                    f"running {path.name}: expected logits for {exact.shape[1]} tokens, found {ours.shape[1]}"
                )
            ours = ours[:, : exact.shape[1]]
        cost = divergence(exact, ours)
        if unlike:
            return Verdict(
                False, None, cost, f"{unlike[0]} is not made of rows of the checkpoint, so they cannot be compared"
            )
        same = self._reference(rounding) if rounding else exact
        if isinstance(same, str):
            return Verdict(False, None, cost, same)
        worst, spread = float(abs(ours - same).max()), root_mean_square(ours - same) / max(float(same.std()), 1e-9)
        bound = SPREAD.get(name, SPREAD_QUANTIZED)
        if not (worst <= EXACT * max(1.0, float(same.std())) if name == "f32" else spread <= bound):
            raise ExportMismatch(
                f"running {path.name} on {len(self.tokens)} tokens: expected logits within "
                f"{EXACT if name == 'f32' else f'{bound:g} of their standard deviation'} of those that transformers "
                f"computes with the same weights, found {worst:.3g} at most and {spread:.3g} of it in the mean (KL "
                f"{cost:.3g} from the unrounded model): llama.cpp computes another model. Nothing was kept"
            )
        return Verdict(True, worst, cost)

    def _rounding(self, name: str) -> tuple[dict[str, str], list[str]]:
        """({checkpoint's tensor: type that its rows have in the file}, tensors of which that cannot be said)."""
        rounding: dict[str, str] = {}
        unlike = []
        for tensor, kind in self.written["types"][name].items():
            if kind == "F32":
                continue
            origins = self.written["origins"][tensor]
            if origins is None or any(rounding.get(one, kind) != kind for one in origins):
                unlike.append(tensor)
            rounding |= dict.fromkeys(origins or (), kind)
        return rounding, unlike

    def _reference(self, rounding: dict[str, str]) -> Any:
        """Return transformers' logits, or why there are none."""
        job = {
            "shapes": {one: list(shape) for one, shape in self.weights.shapes.items()},
            "folder": str(self.scratch / SETTINGS),
            "rounding": rounding,
        }
        try:
            return self._logits(self.transformers, job)
        except CannotExport as error:
            return str(error)

    def _llama(self, path: Path) -> Any:
        return run_file(path, self.tokens, self.scratch)

    def _logits(self, child: Child, job: dict[str, Any]) -> Any:
        return logits_of(child, {**job, "tokens": self.tokens}, self.weights, self.scratch)


def prompt(settings: Path) -> list[int]:
    """Return a prompt without meaning, always the same for a model.

    It is longer than a sliding window that llama.cpp has too, and within one that it has not.
    """
    import random

    config = settings_of(settings)
    window = window_of(config)
    length = LENGTH
    if window is not None:
        length = min(LENGTH, window) if architecture_of(config) in NO_WINDOW else max(LENGTH, window + 16)
    length = min(length, config.get("max_position_embeddings") or length, LONGEST)
    return random.Random(0).choices(range(int(config["vocab_size"])), k=length)


def run_file(path: Path, tokens: list[int], scratch: Path, adapter: Path | None = None) -> Any:
    """Return llama.cpp's logits, or why there are none.

    Raises:
        ExportMismatch: llama.cpp does not load or run the file.
    """
    tools = converter_files()
    job = {"library": str(xllamacpp_library()), "file": str(path), "tokens": tokens}
    job |= {} if adapter is None else {"adapter": str(adapter)}
    try:
        with Child(CHILD, [tools / "gguf-py"], what=f"running {path.name} with llama.cpp") as child:
            found = logits_of(child, job, None, scratch)
    except CannotExport as error:
        raise ExportMismatch(str(error)) from error
    if found is None:
        version = importlib.metadata.version("xllamacpp")
        return f"xllamacpp {version} is another build of llama.cpp than the ones that are known; {pip_install('gguf')}"
    return found


def logits_of(child: Child, job: dict[str, Any], weights: Weights | None, scratch: Path) -> Any:
    """Let a child compute logits; None where it knows that it cannot."""
    import numpy as np

    out = scratch / "logits.npy"
    child.tell({**job, "out": str(out)})
    return None if child.until("logits", weights) is None else np.load(out)


def verify_adapter(adapter: Path, base_gguf: Path, weights: Weights, settings: Path, scratch: Path) -> Verdict:
    """Run an adapter on a GGUF of its base, and compare with transformers on the merged weights.

    Raises:
        ExportMismatch: llama.cpp does not take it, or computes something else.
    """
    why = _impossible(weights)
    if why:
        logger.warning("GGUF: not verified: %s", why)
        return Verdict(False, note=why)
    tokens = prompt(settings)
    shapes = {one: list(shape) for one, shape in weights.shapes.items()}
    job = {"shapes": shapes, "folder": str(settings), "rounding": {}, "tokens": tokens}
    with Child(CHILD, [converter_files() / "gguf-py"], what="computing the reference with transformers") as child:
        merged = logits_of(child, job, weights, scratch)
    ours = run_file(base_gguf, tokens, scratch, adapter)
    if isinstance(ours, str):
        return Verdict(False, note=ours)
    worst = float(abs(ours - merged).max())
    if not worst <= EXACT * max(1.0, float(merged.std())):
        raise ExportMismatch(
            f"running {adapter.name} on {base_gguf.name}: expected logits within {EXACT:g} of transformers', found "
            f"{worst:.3g}: is it an f32 GGUF of the adapter's base? Nothing was kept"
        )
    return Verdict(True, worst, divergence(merged, ours))


def root_mean_square(difference: Any) -> float:
    """Return the root of the mean of the squares."""
    return float((difference.astype("float64") ** 2).mean() ** 0.5)


def divergence(exact: Any, ours: Any) -> float:
    """Mean Kullback-Leibler divergence, in nats per token, of what `ours` predicts from what `exact` predicts."""
    import numpy as np

    def log_softmax(logits: Any) -> Any:
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    first, second = log_softmax(exact), log_softmax(ours)
    return max(0.0, float((np.exp(first) * (first - second)).sum(axis=1).mean()))
