"""Runner (`trlpatch run`): run a script, a module or a program, it and its child processes with TRL patched.

A script or module runs in this process. A program (`trl`, `accelerate`, `torchrun`, ...) replaces this process, and is
patched as its children are: trlpatch/runtime/children.py.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from trlpatch.errors import InvalidOption
from trlpatch.options import QUIET, Options, read_switch
from trlpatch.runtime.children import environment_for, is_child, stock_children
from trlpatch.runtime.report import PatchReport
from trlpatch.runtime.session import apply
from trlpatch.source.targets import TARGETS

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Where launchers say a process's rank, those over all hosts first."""


def run_script(argv: Sequence[str], options: Options, *, quiet: bool = False) -> None:
    """Patch TRL, then do what `python *argv` does: `[script, args...]` or `["-m", module, args...]`; or run a program.

    `sys.argv` and `sys.path[0]` are what python itself would set, and stay so: this is a process's last act. What the
    script raises, `SystemExit` included, reaches the caller. A first word that is no Python script is a program,
    looked for beside this interpreter, then on PATH. PYTHONPATH and TRLPATCH_CHILDREN are set, so that child processes
    are patched, too. A line on stderr says what was patched, unless `quiet` or TRLPATCH_QUIET; of several ranks that
    run this, rank 0 says it.

    Raises:
        InvalidOption: there is no script or program to run, or an option before it is not known.
        SystemExit: there is no such module; with python's message and its status.
        TrlpatchError: TRL cannot be patched, see `PatchFastRL`.
    """
    as_module = argv[:1] == ["-m"]
    words = list(argv[1:] if as_module else argv)
    if not words:
        raise InvalidOption(
            "trlpatch run: nothing to run, expected `trlpatch run script.py args...`, `trlpatch run -m module ...` or "
            "a program, such as `trlpatch run trl grpo ...`"
        )
    if not as_module and words[0].startswith("-"):
        raise _unknown_option(words[0])
    program = None if as_module or _is_script(Path(words[0])) else _program(words[0])
    if as_module:
        _set_first_path(str(Path.cwd()))
        _require_module(words[0].partition(".")[0])
    # Also before a program: what does not fit is said once, here, and the ranks to come find the cache full.
    report = apply(options)
    if not (quiet or read_switch(QUIET)) and is_first_rank(os.environ) and not is_child(os.environ):
        sys.stderr.write(f"{announcement(report, options)}\n")
    os.environ.update(environment_for(options, os.environ))
    if program is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(program, words)
    sys.argv = words
    if as_module:
        _run_module(words[0])
        return
    script = Path(words[0])
    if script.is_file() and script.suffix not in (".zip", ".pyz"):
        _set_first_path(str(script.resolve().parent))
    elif not sys.flags.safe_path:
        del sys.path[0]  # runpy puts a directory or archive with a __main__.py there itself
    runpy.run_path(words[0], run_name="__main__")


def announcement(report: PatchReport, options: Options) -> str:
    """Return the line that says what was patched and with which options."""
    if report.disabled:
        return str(report)
    trainers = [name for name in report.modules if TARGETS[name].kind == "trainer" and report.cache[name] != "off"]
    defaults = vars(Options())
    chosen = [f"{name}={value!r}" for name, value in vars(options).items() if value != defaults[name]]
    parts = [
        f"trlpatch: TRL {report.trl}, {len(report.applied)} patches applied, child processes included",
        f"trainers {', '.join(trainers)}",
        f"options {' '.join(chosen) or 'default'}",
    ]
    return "; ".join([*parts, *filter(None, [stock_children()])])


def _require_module(package: str) -> None:
    """Exit as python does where there is no such package or module at the top level; none is imported."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a relative name, a module without __spec__: runpy says what it thinks of it
        return
    if found is None:
        sys.exit(f"{sys.executable}: No module named {package}")


def _run_module(name: str) -> None:
    """Do what `python -m name` does, with its message where runpy finds no such module or nothing to run in it."""
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except ImportError as error:
        if _raised_in(error, "_get_module_details"):
            sys.exit(f"{sys.executable}: {error}")
        raise


def _raised_in(error: BaseException, function: str) -> bool:
    """Tell whether a function of runpy itself raised it."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = None if traceback is None else traceback.tb_frame
    return frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) == ("runpy", function)


def is_first_rank(environ: Mapping[str, str]) -> bool:
    """Tell whether this process is rank 0, or no rank of anything."""
    return next((environ[name] for name in _RANKS if environ.get(name)), "0") == "0"


def _unknown_option(word: str) -> InvalidOption:
    import difflib  # for messages alone

    name = word.partition("=")[0]
    known = ["-m", "--quiet", *(f"--{option.replace('_', '-')}" for option in vars(Options()))]
    close = "".join(f" (did you mean {one}?)" for one in difflib.get_close_matches(name, known, n=1))
    return InvalidOption(
        f"trlpatch run has no option {name}{close}. It has {', '.join(known)}; what python itself takes, such as -c, "
        "is run with `trlpatch run python ...`, and what follows the script is the script's own."
    )


def _is_script(path: Path) -> bool:
    """Tell whether python itself can run `path`: a directory or archive with a `__main__`, or a file of Python."""
    if path.is_dir():
        return (path / "__main__.py").is_file()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.readline(256)
    return not (head.startswith(b"\x7fELF") or (head.startswith(b"#!") and b"python" not in head))


def _program(name: str) -> str:
    if name.endswith(".py"):
        raise InvalidOption(f"trlpatch run {name}: no such file {Path.cwd() / name}")
    # Beside this interpreter first: the `trl` of its environment, also where that is not activated.
    beside = None if os.sep in name else shutil.which(name, path=sysconfig.get_path("scripts"))
    found = beside or shutil.which(name)
    if found is None:
        raise InvalidOption(
            f"trlpatch run {name}: no such file in {Path.cwd()}, and no such program beside {sys.executable} or on "
            "PATH. A module is run with -m."
        )
    return found


def _set_first_path(directory: str) -> None:
    # Under -P (safe_path) python adds no first entry.
    if not sys.flags.safe_path:
        sys.path[0] = directory
