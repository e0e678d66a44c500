"""Comparison of a server with transformers: the log-probabilities of the same tokens, and how far apart they may be.

The server reports those of its prompt, where it can, and of tokens that it samples; transformers computes the same in
float32, in a process of its own (`reference.py`). What a bound has to allow is measured, not guessed, where the server
computes in another dtype: transformers runs once more in that dtype, and the bound is a multiple of what it costs
there. What a quantized file may miss of the checkpoint it was made of is a table.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trlpatch.errors import ServerFailed
from trlpatch.serving.artifact import Artifact
from trlpatch.serving.backends import Launch
from trlpatch.serving.names import LLAMA_CPP, VLLM

REFERENCE = Path(__file__).with_name("reference.py")

TEXTS = (
    "The first ten numbers are one, two, three, four, five, six, seven, eight, nine and ten.",
    "Question: a river flows 12 km in 3 hours. How far does it flow in an hour?",
    "def add(a, b):\n    return a + b\n",
)
SAMPLED = 16
"""Tokens that the server samples after each text: decoding is another path than reading a prompt."""

FLOOR = 1e-3
"""Mean gap that float32 may have: other kernels, another order of sums. vLLM on a CPU has 3e-6."""

ROUNDING = 3.0
"""How many times the gap that its dtype costs in transformers a server may have."""

LLAMA_CPP_FLOOR = 1e-2
"""The same for llama.cpp, which keeps its KV cache in float16 and rounds activations where weights are rounded."""

QUANTIZED = {"Q8": 0.05, "Q6": 0.15, "Q5": 0.3, "Q4": 0.6, "Q3": 1.0, "Q2": 2.0, "IQ": 2.0, "TQ": 2.0}
"""Mean gap to the checkpoint that a GGUF file of such tensors may have."""

QUANTIZED_ITSELF = 0.05
"""Mean gap to its own dequantized weights: llama.cpp quantizes the activations beside them."""


@dataclass(frozen=True)
class Scored:
    """What a server told about one text.

    Attributes:
        text: what was asked.
        prompt: its tokens, None where the server does not tell them.
        sampled: tokens that it sampled after them.
        logprobs: of the last tokens of both together, None for one that it did not tell.
    """

    text: str
    prompt: list[int] | None
    sampled: list[int]
    logprobs: list[float | None]


@dataclass(frozen=True)
class Comparison:
    """Served log-probabilities beside those of transformers.

    Attributes:
        served: what was asked.
        reference: what it was compared with.
        tokens: how many log-probabilities were compared.
        mean: mean absolute gap.
        largest: largest one.
        bound: what `mean` may be.
        why: where the bound comes from.
        effect: of an adapter, the mean gap between transformers with and without it; None for anything else.
        to_base: of an adapter, the mean gap between the server and transformers without the adapter.
        other_tokens: a text that server and reference turn into different tokens; None where there is none.
    """

    served: str
    reference: str
    tokens: int
    mean: float
    largest: float
    bound: float
    why: str
    effect: float | None = None
    to_base: float | None = None
    other_tokens: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the gap is within the bound, the tokens are the same, and the adapter is nearer than its base."""
        # A mean that is not a number is not within the bound: it compares as False.
        return self.mean <= self.bound and self.other_tokens is None and not self.nearer_to_base

    @property
    def nearer_to_base(self) -> bool:
        """Whether what is served is nearer to the base model than to the adapter, which is expected to change it."""
        return bool(self.effect) and self.to_base is not None and self.to_base < self.mean

    def __str__(self) -> str:
        lines = [
            f"served      {self.served}",
            f"reference   {self.reference}, in transformers, float32",
            f"gap         mean {self.mean:.2g}, largest {self.largest:.2g}, over {self.tokens} tokens",
            f"bound       mean {self.bound:.2g}: {self.why}",
        ]
        if self.effect is not None:
            lines.append(f"adapter     moves them by {self.effect:.2g}; served to base {self.to_base or 0:.2g}")
        if self.other_tokens is not None:
            lines.append(f"tokenizer   server and reference make different tokens of {self.other_tokens!r}")
        doubt = ", and nearer to its base model: is the adapter applied?" if self.nearer_to_base else ""
        lines.append(f"verdict     {'within the bound' if self.passed else f'NOT the reference{doubt}'}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {**asdict(self), "passed": self.passed}


Ask = Callable[[str, dict[str, Any]], Any]


def served_sequences(ask: Ask, how: Launch) -> list[Scored]:
    """Return what the server says of TEXTS and of what it samples after them.

    Raises:
        ServerFailed: it reports no log-probabilities.
    """
    read = {VLLM: _of_vllm, LLAMA_CPP: _of_llama_cpp_python}.get(how.backend, _of_llama_cpp)
    try:
        return [read(ask, how.model, text) for text in TEXTS]
    except (KeyError, TypeError, IndexError) as error:
        raise ServerFailed(f"{how.backend} reports log-probabilities in an unknown form: {error!r}") from error


def compare(
    sequences: Sequence[Scored], how: Launch, served: Artifact, wanted: Artifact, timeout: float | None = None
) -> Comparison:
    """Return how far what the server said of `served` is from what transformers computes for `wanted`.

    Raises:
        ServerFailed: transformers cannot load the reference.
    """
    found = _reference(wanted, how.dtype, sequences, timeout)
    told = [value for sequence in sequences for value in sequence.logprobs]
    mean, largest = _gap(told, found["logprobs"])
    bound, why = _bound(how, served, wanted, found)
    base = found["base"]
    return Comparison(
        served=f"{how.model} by {how.backend}: {served}",
        reference=str(wanted),
        tokens=sum(value is not None for value in told),
        mean=mean,
        largest=largest,
        bound=bound,
        why=why,
        effect=None if base is None else _gap(found["logprobs"], base)[0],
        to_base=None if base is None else _gap(told, base)[0],
        other_tokens=found["other_tokens"],
    )


def _of_vllm(ask: Ask, model: str, text: str) -> Scored:
    asked = {"model": model, "prompt": text, "max_tokens": SAMPLED, "temperature": 1.0, "seed": 0, "ignore_eos": True}
    asked |= {"logprobs": 1, "prompt_logprobs": 0, "return_token_ids": True}
    choice = ask("/v1/completions", asked)["choices"][0]
    prompt = choice["prompt_token_ids"]
    of_prompt = [
        entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
    ]
    return Scored(text, prompt, choice["token_ids"], [*of_prompt, *choice["logprobs"]["token_logprobs"]])


def _of_llama_cpp(ask: Ask, model: str, text: str) -> Scored:
    """Ask for one token at a time: of several, llama.cpp leaves out those that end inside a UTF-8 character."""
    prompt = ask("/tokenize", {"content": text, "add_special": True})["tokens"]
    asked = {"model": model, "n_predict": 1, "n_probs": 1, "return_tokens": True, "cache_prompt": True}
    asked |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "samplers": ["temperature"]}
    sampled: list[int] = []
    logprobs: list[float | None] = []
    for step in range(2 * SAMPLED):
        answer = ask("/completion", {**asked, "prompt": [*prompt, *sampled], "seed": step})
        if len(answer["tokens"]) != 1:  # the end of the text
            break
        told = answer.get("completion_probabilities") or [{}]
        sampled += answer["tokens"]
        logprobs.append(told[0].get("logprob"))
    return Scored(text, prompt, sampled, logprobs)


def _of_llama_cpp_python(ask: Ask, model: str, text: str) -> Scored:
    asked = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0.0, "logprobs": 1, "echo": True}
    # The last one is that of the sampled token, which is told as text.
    told = ask("/v1/completions", asked)["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    return Scored(text, None, [], [float(value) for value in told])


def _reference(wanted: Artifact, dtype: str, sequences: Sequence[Scored], timeout: float | None) -> dict[str, Any]:
    """Run reference.py, whose memory is free again when it ends."""
    with tempfile.TemporaryDirectory(prefix="trlpatch-check-") as folder:
        asked, answer = Path(folder, "asked.json"), Path(folder, "answer.json")
        question = {
            "kind": wanted.kind,
            "path": str(wanted.path),
            "base": wanted.base,
            "tokenizer": None if wanted.tokenizer is None else str(wanted.tokenizer),
            "dtype": dtype,
            "sequences": [
                {"text": one.text, "prompt": one.prompt, "sampled": one.sampled, "scored": len(one.logprobs)}
                for one in sequences
            ],
        }
        asked.write_text(json.dumps(question), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-P", str(REFERENCE), str(asked), str(answer)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
        )
        if done.returncode or not answer.is_file():
            last = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-8:])
            raise ServerFailed(f"transformers cannot compute the reference, {wanted}:\n{last}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _bound(how: Launch, served: Artifact, wanted: Artifact, found: dict[str, Any]) -> tuple[float, str]:
    """What the mean gap may be, and why."""
    if served.kind == "gguf":
        return _gguf_bound(served, wanted, found)
    if found["rounded"] is None:
        return FLOOR, f"{how.backend} computes in float32"
    cost = _gap(found["logprobs"], found["rounded"])[0]
    bound = max(FLOOR, ROUNDING * cost)
    return bound, f"{found['dtype']} costs {cost:.2g} in transformers, a server may have {ROUNDING:g} times that"


def _gguf_bound(served: Artifact, wanted: Artifact, found: dict[str, Any]) -> tuple[float, str]:
    names = tensor_types(served.path)
    worst = max(names, key=lambda name: QUANTIZED.get(_family(name), 0.0), default="F32")
    lossy = QUANTIZED.get(_family(worst))
    if lossy is None:
        return LLAMA_CPP_FLOOR, f"llama.cpp with weights in {', '.join(sorted(names))}"
    if wanted.path == served.path:
        return QUANTIZED_ITSELF, f"llama.cpp with its own {worst} weights"
    return lossy, f"what {worst} may miss of a checkpoint"


def tensor_types(path: Path) -> set[str]:
    """Return the types of a GGUF file's matrices: F32, F16, Q8_0, Q4_K, ..."""
    from gguf import GGUFReader

    return {tensor.tensor_type.name for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1}


def _family(name: str) -> str:
    return name[:2]


def _gap(left: Sequence[float | None], right: Sequence[float | None]) -> tuple[float, float]:
    """Mean and largest absolute difference of what is there on both sides; infinite where there is nothing."""
    pairs = zip(left, right, strict=True)
    gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    if not gaps:
        return math.inf, math.inf
    return sum(gaps) / len(gaps), max(gaps)
