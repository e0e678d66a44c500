"""What is seen of a load: a stage at a time on a terminal, and one line when it is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from trlpatch.loading.memory import gib


class Progress:
    """Shows the stages of loading one model on stderr; nothing but the final line where that is no terminal."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._started = time.monotonic()

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Show what is done now, while it is done."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(f"{self._model}: {what}", spinner="line"):
            yield

    def done(self, size: int, of_what: str, facts: list[str]) -> None:
        """Say how long it took, how much memory (`size` bytes of `of_what`) it takes, and what was made."""
        seconds = time.monotonic() - self._started
        text = f"trlpatch: {self._model} ready in {seconds:.1f} s, {gib(size)} of {of_what}: {', '.join(facts)}"
        self._console.print(text, markup=False)


def memory_in_use() -> tuple[int, str]:
    """(bytes, of what): of the current CUDA device, by whomever; without CUDA of this process."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return int(total - free), "GPU memory"
    import psutil

    process: Any = psutil.Process()
    return int(process.memory_info().rss), "memory"
