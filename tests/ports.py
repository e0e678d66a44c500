"""Ports for what tests start: every process has a block of them that no other process has.

vLLM, TRL and torch pick a port, close it, and listen on it later. In between, the kernel may give it to any process
that asks for some port or opens a connection: all of them draw from one range (`net.ipv4.ip_local_port_range`). A
block lies below that range, and belongs to whoever has bound its first port. In a block vLLM counts up from VLLM_PORT,
and torch.distributed listens on MASTER_PORT.

`own` gives this process a block, and from then on one to every process that it starts: to notebooks, pages of the
documentation and servers as well, which know nothing of this module.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import weakref
from pathlib import Path
from typing import Any

SIZE = 40
FIRST, LAST = 20_000, 32_000
"""Above what Ray gives its workers (10002 to 19999), below what Linux chooses from (32768 to 60999)."""

_LOCAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class Block:
    """Forty ports of this process, or of one that it starts, until `close` or its end."""

    def __init__(self, first: int) -> None:
        """Bind the first port.

        Raises:
            OSError: another process has the block, or uses a port of it.
        """
        with socket.socket() as mark:
            mark.bind(("", first))
            for port in range(first + 1, first + SIZE):
                with socket.socket() as probe:
                    probe.bind(("", port))
            self._mark = mark.detach()  # a number: an object would warn when it is left to the process's end
        self.master = first + 1
        self.vllm = first + 2

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that have a process stay in this block."""
        return {"MASTER_PORT": str(self.master), "VLLM_PORT": str(self.vllm)}

    def close(self) -> None:
        """Let others have it."""
        os.close(self._mark)


def claim() -> Block:
    """Return a block that no other process has.

    Raises:
        RuntimeError: there is none.
    """
    blocks = range(FIRST, _end(), SIZE)
    start = random.SystemRandom().randrange(len(blocks))
    for first in (*blocks[start:], *blocks[:start]):
        try:
            return Block(first)
        except OSError:
            continue
    raise RuntimeError(f"No {SIZE} ports in a row are free in {blocks}")


def _end() -> int:
    """Return where the kernel's own range begins, at most LAST; a range that begins lower leaves no better place."""
    try:
        lowest = int(_LOCAL_RANGE.read_text(encoding="ascii").split()[0])
    except OSError:
        return LAST
    return min(lowest, LAST) if lowest >= FIRST + 100 * SIZE else LAST


_kept: list[Block] = []
_own: list[Block] = []


def environment() -> dict[str, str]:
    """Return the variables of a new block, which stays claimed as long as this process lives."""
    _kept.append(claim())
    return _kept[-1].environment


def own() -> None:
    """Give this process a block, and from now on one to each process that it starts or forks."""
    if not _own:
        _take()
        os.register_at_fork(after_in_child=_take)
        subprocess.Popen.__init__ = _start  # type: ignore[method-assign]


def _take() -> None:
    for block in _own:  # of the process that forked this one, which keeps it
        block.close()
    _own[:] = [claim()]
    for name, value in _own[0].environment.items():
        # Ranks that torchrun starts meet at one MASTER_PORT.
        if name != "MASTER_PORT" or "TORCHELASTIC_RUN_ID" not in os.environ:
            os.environ[name] = value


_popen: Any = subprocess.Popen.__init__


def _start(self: subprocess.Popen[Any], *args: Any, env: Any = None, **named: Any) -> None:
    """Start a process as `subprocess.Popen` does, with a block of its own where it would inherit that of this one."""
    theirs = dict(os.environ if env is None else env)
    block = claim()
    for name, value in block.environment.items():
        if name in theirs and theirs[name] == os.environ.get(name):
            theirs[name] = value
    weakref.finalize(self, block.close)
    _popen(self, *args, env=theirs, **named)
