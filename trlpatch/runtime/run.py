"""Script runner (`trlpatch run`): run somebody's script or module as `__main__` in a patched process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from trlpatch.errors import InvalidOption
from trlpatch.options import Options
from trlpatch.runtime.session import apply


def run_script(argv: Sequence[str], options: Options) -> None:
    """Patch TRL, then do what `python *argv` does: `[script, args...]` or `["-m", module, args...]`.

    `sys.argv` and `sys.path[0]` are what python itself would set, and stay so: this is a process's last act. What the
    script raises, `SystemExit` included, reaches the caller. Under `accelerate launch -m trlpatch run script.py` every
    rank patches for itself.

    Raises:
        InvalidOption: there is no script or module to run.
        TrlpatchError: TRL cannot be patched, see `PatchFastRL`.
    """
    as_module = argv[:1] == ["-m"]
    words = list(argv[1:] if as_module else argv)
    if not words:
        raise InvalidOption(
            "nothing to run: expected `trlpatch run script.py args...` or `trlpatch run -m module ...`"
        )
    if not as_module and not Path(words[0]).exists():
        raise InvalidOption(f"cannot run {words[0]!r}: no such file in {Path.cwd()}. A module is run with -m.")
    apply(options)
    sys.argv = words
    if as_module:
        _set_first_path(str(Path.cwd()))
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        return
    script = Path(words[0])
    if script.is_file() and script.suffix not in (".zip", ".pyz"):
        _set_first_path(str(script.resolve().parent))
    elif not sys.flags.safe_path:
        del sys.path[0]  # runpy puts a directory or archive with a __main__.py there itself
    runpy.run_path(words[0], run_name="__main__")


def _set_first_path(directory: str) -> None:
    # Under -P (safe_path) python adds no first entry.
    if not sys.flags.safe_path:
        sys.path[0] = directory
