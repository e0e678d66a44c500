"""Drain an engine: nothing in flight and the device idle, before memory that its kernels read is written or unmapped.

With asynchronous scheduling (vLLM's default in this process from 0.19.1) the engine schedules a step before the one
before it has answered. `LLM.generate` returns with the last answer, and the step scheduled beyond it is still running
or still queued then; so it is, with unfinished requests, after an interrupt.
"""

from __future__ import annotations

from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.memory import device


def drain(engine: Any) -> None:
    """Take the answers of batches that are still queued, then wait for the device.

    Unfinished requests are left as they are, and nothing of theirs is scheduled: only their kernels are waited for.
    Batches of an engine core in another process are its own loop's business; it finishes them unasked.
    """
    core = probes.engine_core(engine)
    queued = getattr(core, "batch_queue", None)
    if queued and not unfinished(engine):
        while queued:
            # Schedules an empty batch at most: every request is finished. The answers name requests nobody waits for.
            engine.llm_engine.engine_core.get_output()
    device.synchronize()


def unfinished(engine: Any) -> bool:
    """Tell whether requests have been added and not answered to their end."""
    asked = getattr(engine.llm_engine, "has_unfinished_requests", None)
    return bool(callable(asked) and asked())
