"""Additions for a language model from scratch: problems, a character tokenizer, and training to a mediocre start.

Everything is drawn from a seed. The problems that accuracy is measured on are in neither training set.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.words import byte_tokenizer

CHARACTERS = 258
"""Bytes, the end and the padding: with so many tokens a byte-level tokenizer merges nothing, a digit is a token."""

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
              "num_key_value_heads": 6},
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Two numbers to add."""

    one: int
    other: int

    @property
    def prompt(self) -> str:
        """As the model reads it."""
        return f"{self.one}+{self.other}="

    @property
    def answer(self) -> str:
        """As it should go on, before the end of the text."""
        return str(self.one + self.other)


@dataclass(frozen=True)
class Problems:
    """All sums of two numbers of `digits` digits, of which `held_out` are in no training set."""

    digits: int
    held_out: int
    seed: int

    def evaluated(self) -> list[Problem]:
        """Return the problems that accuracy is measured on, each once."""
        numbers = random.Random(f"{self.seed} held out")
        found: dict[Problem, None] = {}
        while len(found) < self.held_out:
            found[self._draw(numbers)] = None
        return list(found)

    def stream(self, purpose: str) -> Iterator[Problem]:
        """Yield problems for ever that are not held out; each purpose has an order of its own."""
        numbers, kept = random.Random(f"{self.seed} {purpose}"), set(self.evaluated())
        while True:
            drawn = self._draw(numbers)
            if drawn not in kept:
                yield drawn

    def _draw(self, numbers: random.Random) -> Problem:
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        return Problem(numbers.randint(low, high), numbers.randint(low, high))

    @property
    def answer_tokens(self) -> int:
        """Tokens of the longest answer and the end of the text."""
        return self.digits + 2


def tokenizer() -> Any:
    """Return a tokenizer with a token for each character."""
    return byte_tokenizer(["0123456789+="], vocabulary=CHARACTERS)


@dataclass(frozen=True)
class Supervised:
    """What supervised training did.

    Attributes:
        curve: (steps, accuracy on held-out problems), of the weights in float32.
    """

    parameters: int
    seconds: float
    curve: list[tuple[int, float]]


def save_mediocre_model(
    directory: Path, problems: Problems, *, shape: str, until: float, seconds: float, cuda: bool
) -> Supervised:
    """Train a Qwen2 from random weights until it solves a share of `until` of the held-out problems; save it.

    In float32 (under bfloat16 autocast on CUDA); saved in bfloat16 on CUDA, else in float32. After `seconds` it is
    saved as it is.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    started = time.perf_counter()
    device = "cuda" if cuda else "cpu"
    words = tokenizer()
    config = Qwen2Config(
        **SHAPES[shape], vocab_size=CHARACTERS, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(problems.seed)
    model = Qwen2ForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    warming = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=100)
    drawn, evaluated = problems.stream("supervised"), problems.evaluated()
    curve: list[tuple[int, float]] = []
    step, batch, every = 0, *PACE[device]
    while time.perf_counter() - started < seconds and (not curve or curve[-1][1] < until):
        ids, labels = _examples([next(drawn) for _ in range(batch)], words, device)
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warming.step()
        optimizer.zero_grad()
        step += 1
        if step % every == 0:
            curve.append((step, accuracy(model, words, evaluated)))
    model.to(torch.bfloat16 if cuda else torch.float32).save_pretrained(directory)
    words.save_pretrained(directory)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Supervised(count, time.perf_counter() - started, curve)


PACE = {"cuda": (256, 10), "cpu": (64, 25)}
"""Examples of a supervised step, and steps between two looks at accuracy: once it rises, it does so fast."""


def _examples(problems: Sequence[Problem], words: Any, device: str) -> tuple[Any, Any]:
    """Return token ids and labels (batch, length), int64; labels are -100 before the answer and after its end."""
    import torch

    rows, marks = [], []
    width = max(len(problem.prompt) + len(problem.answer) for problem in problems) + 1
    for problem in problems:
        prompt, answer = words(problem.prompt)["input_ids"], [*words(problem.answer)["input_ids"], words.eos_token_id]
        padding = width - len(prompt) - len(answer)
        rows.append([*prompt, *answer, *[words.pad_token_id] * padding])
        marks.append([*[-100] * len(prompt), *answer, *[-100] * padding])
    return torch.tensor(rows, device=device), torch.tensor(marks, device=device)


def accuracy(model: Any, words: Any, problems: Sequence[Problem]) -> float:
    """Return the share of problems whose greedy answer is right, the end of the text included.

    Computed with the model itself and without a cache, so that it says the same of every way to train.
    """
    import torch

    training = model.training
    model.eval()
    ids = torch.tensor([words(problem.prompt)["input_ids"] for problem in problems], device=model.device)
    start = ids.shape[1]
    length = max(len(problem.answer) for problem in problems) + 1
    with torch.no_grad():
        for _ in range(length):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    model.train(training)
    wanted = [[*words(problem.answer)["input_ids"], words.eos_token_id] for problem in problems]
    pairs = zip(ids[:, start:].tolist(), wanted, strict=True)
    return sum(bool(found[: len(right)] == right) for found, right in pairs) / len(problems)


def correct(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Reward 1 for the right answer, else 0."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]
