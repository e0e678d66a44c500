"""Child processes: the environment in which Python patches TRL by itself, with the options of the parent.

`trlpatch run` sets it for whatever it starts (`accelerate launch`, torchrun, TRL's own command line, workers that
multiprocessing spawns). PYTHONPATH gets a directory with a `sitecustomize`, as other tools that instrument child
processes do it: it works in any virtual environment, and is inherited like any variable. Python does not look there
under -E, -I and -S.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from trlpatch.errors import InvalidOption
from trlpatch.log import logger
from trlpatch.options import CHILDREN, Options, active
from trlpatch.runtime import session
from trlpatch.source.locate import target_names

BOOTSTRAP = str(Path(__file__).parent / "bootstrap")
"""The directory of our sitecustomize."""


def child_environment() -> dict[str, str]:
    """Return the environment variables with which a child process patches TRL as this process did.

    For processes that your own code starts after `PatchFastRL()`: `subprocess.run(..., env={**os.environ,
    **trlpatch.child_environment()})`, a cluster's `env_vars`, or for all of them, multiprocessing's spawn included,
    `os.environ.update(trlpatch.child_environment())`. Before any `PatchFastRL()` it is that of the default options.
    """
    report = session.status()
    options = active()  # before any PatchFastRL() the default ones
    if report.modules.keys() - target_names(options.algorithm):
        options = Options(
            **{**vars(options), "algorithm": None}
        )  # an earlier call patched more than the last one named
    return environment_for(options, os.environ)


def environment_for(options: Options, environ: Mapping[str, str]) -> dict[str, str]:
    """Return PYTHONPATH and TRLPATCH_CHILDREN for children of a process that has `environ`."""
    inherited = environ.get("PYTHONPATH")
    entries = [entry for entry in inherited.split(os.pathsep) if entry != BOOTSTRAP] if inherited else []
    return {
        "PYTHONPATH": os.pathsep.join([BOOTSTRAP, *entries]),
        CHILDREN: json.dumps(vars(options)),
    }


def is_child(environ: Mapping[str, str]) -> bool:
    """Tell whether this process inherits that environment, so that its parent has said what there is to say."""
    return BOOTSTRAP in environ.get("PYTHONPATH", "").split(os.pathsep)


def stock_children() -> str:
    """Return why children of this process that get its interpreter flags stay stock; empty where they do not."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        return "child processes stay stock: with -E, -I and -S python reads no PYTHONPATH or no sitecustomize"
    return ""


def patch_child() -> None:
    """Patch this process as its parent said, unless it has called `PatchFastRL` itself.

    Raises:
        InvalidOption: TRLPATCH_CHILDREN is not what `environment_for` wrote.
        TrlpatchError: as `PatchFastRL` does.
    """
    if not session.is_decided():
        session.apply(inherited_options(os.environ))


def inherited_options(environ: Mapping[str, str]) -> Options:
    """Return the options that the parent handed down.

    Raises:
        InvalidOption: they cannot be read.
    """
    text = environ.get(CHILDREN)
    if text is None:
        # A launcher that sends PYTHONPATH to other hosts, and nothing it does not know.
        logger.warning("%s is not set in this process, TRL is patched with the default options", CHILDREN)
        return Options()
    try:
        return Options(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise InvalidOption(
            f"{CHILDREN}={text!r}: expected the options of `trlpatch run` as JSON, which it sets itself ({error}). "
            "Unset it, or start the process under `trlpatch run`."
        ) from error
