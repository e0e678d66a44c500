"""Run the code blocks of a page as a reader would paste them: `python -m tests.docs.run_page docs/x.md DIRECTORY`.

What a reader has and a test has not is stood in for, and nothing else: models of the hub are a tiny random one under
their names, in a hub cache of this run, or of all that start warm; engines are built eagerly; what asks for a GPU
computes on the CPU.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import warm
from tests.docs.pages import ROOT, Block, has_engine, path_of, python_of, runnable

_HUB_NAME = re.compile(r"[\"' ]((?:Qwen|unsloth|meta-llama|HuggingFaceTB|google)/[\w.-]+)")
_CONFIG = re.compile(r"Config\(")
_SECONDS = 600


def main(page: Path, directory: Path) -> None:
    chosen = runnable(page)
    home = Path(os.environ.pop(warm.HUB, directory / "hub-home"))
    os.environ["HF_HOME"] = str(home)
    os.environ["PATH"] = f"{_command(directory)}{os.pathsep}{os.environ['PATH']}"
    _hub(home / "hub", directory, {name for block in chosen for name in _HUB_NAME.findall(block.text)})
    work = directory / "work"
    work.mkdir()
    os.chdir(work)
    if has_engine(page):  # importing vLLM takes longer than most pages
        _eager_engines()
    if _CONFIG.search(python_of(page)):
        _trainings_on_cpu()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    sys.path.insert(0, "")
    for block in chosen:
        print(f"--- {path_of(page)}:{block.line} {block.language}", flush=True)
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.text  # tracebacks name the page's own lines
            exec(compile(code, str(page), "exec"), namespace)
        else:
            _shell(block)


def _shell(block: Block) -> None:
    subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True, timeout=_SECONDS)


def _command(directory: Path) -> Path:
    """Make the directory that has `trlpatch` and `python` for shell blocks."""
    folder = directory / "bin"
    folder.mkdir()
    for name, words in (("trlpatch", "-m trlpatch"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def _hub(hub: Path, directory: Path, names: set[str]) -> None:
    """Lay a tiny model into the hub cache under each name, as a download would; it is the same for every page."""
    places = {hub / f"models--{name.replace('/', '--')}" for name in names}
    if not (absent := [place for place in places if not place.exists()]):
        return
    made = tiny.checkpoint(directory / "tiny", max_position_embeddings=4096)
    hub.mkdir(parents=True, exist_ok=True)
    for place in absent:
        half = Path(tempfile.mkdtemp(dir=hub))
        shutil.copytree(made, half / "snapshots" / "0")
        (half / "refs").mkdir()
        (half / "refs" / "main").write_text("0", encoding="ascii")
        try:
            half.rename(place)
        except OSError:  # not empty: another page was faster
            shutil.rmtree(half)


def _eager_engines() -> None:
    import vllm

    build = vllm.LLM.__init__

    def eager(self: Any, *arguments: Any, **settings: Any) -> None:
        build(self, *arguments, **{"enforce_eager": True, **settings})

    eager.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
    vllm.LLM.__init__ = eager


def _trainings_on_cpu() -> None:
    """Let configs that ask for bfloat16, TRL's default, compute on the CPU."""
    from transformers import TrainingArguments

    check = TrainingArguments.__post_init__

    def on_cpu(self: Any) -> None:
        self.use_cpu = True
        check(self)

    TrainingArguments.__post_init__ = on_cpu


if __name__ == "__main__":
    main((ROOT / sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
