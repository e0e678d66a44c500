"""Patching without a call: what `FastLanguageModel.from_pretrained` does before it builds an engine."""

from __future__ import annotations

import os

from trlpatch.errors import TrlNotFound, TrlpatchError
from trlpatch.log import logger
from trlpatch.options import Options
from trlpatch.runtime import children, session
from trlpatch.source.locate import installed_root

CALLER = "FastLanguageModel.from_pretrained"


def patch_for_engine() -> None:
    """Patch TRL as `PatchFastRL()` does, or under `trlpatch run` as that was told to, unless it is patched already.

    Does nothing where there is no TRL, or TRLPATCH_DISABLE is set.

    Raises:
        TrlpatchError: TRL is there and cannot be patched; nothing was changed. As `PatchFastRL` raises it, with a note
            that says how to load the model all the same.
    """
    if session.is_decided():
        return
    try:
        installed_root()
    except TrlNotFound as error:
        logger.debug("%s patches nothing: %s", CALLER, error)
        return
    inherits = children.is_child(os.environ)
    try:
        session.apply(children.inherited_options(os.environ) if inherits else Options(), caller=CALLER)
    except TrlpatchError as error:
        error.add_note(
            f"{CALLER} patches TRL for the engine that it builds; nothing was loaded. Call trlpatch.PatchFastRL(...) "
            'with other options before it (on_drift="stock", skip=...), or load with patch_trl=False.'
        )
        raise
