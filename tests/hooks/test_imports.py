"""TRL's modules import the hooks: that must cost nothing and drag nothing in."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "vllm", "peft", "transformers", "trl", "libcst", "accelerate")


def test_importing_the_hooks_imports_nothing_heavy() -> None:
    program = f"import trlpatch.hooks, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_that_patched_code_calls_is_there() -> None:
    from trlpatch import hooks
    from trlpatch.rewrite.registry import patches

    called = {name for patch in patches() for name in patch.hooks}
    assert called <= set(hooks.__all__)
    assert all(callable(getattr(hooks, name)) for name in hooks.__all__)
