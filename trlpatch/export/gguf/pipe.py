"""The pipe between an export and its child process: JSON messages, and rows of weights as bytes.

The child asks for rows by name; what it is told to do, and what it says of its progress and result, is JSON. Nothing
is pickled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from trlpatch.errors import CannotExport, ExportMismatch, TrlpatchError
from trlpatch.export.gguf.weights import Weights

Message = dict[str, Any]
_TAIL = 2000
_PACKAGE = Path(__file__).resolve().parents[3]


def send(pipe: Connection, message: Message) -> None:
    """Send a message."""
    pipe.send_bytes(json.dumps(message).encode())


def receive(pipe: Connection) -> Message:
    """Wait for a message.

    Raises:
        EOFError: the other process is gone.
    """
    message: Message = json.loads(pipe.recv_bytes())
    return message


class RemoteWeights:
    """In the child: the weights that the other end of the pipe has."""

    def __init__(self, pipe: Connection, shapes: Mapping[str, Sequence[int]]) -> None:
        self._pipe = pipe
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def rows(self, name: str, start: int, stop: int) -> Any:
        """Rows [start, stop) as a float32 array."""
        import numpy as np

        shape = (stop - start, *self.shapes[name][1:]) if self.shapes[name] else ()
        block = np.empty(shape, dtype=np.float32)
        send(self._pipe, {"rows": name, "start": start, "stop": stop})
        if block.nbytes:
            received = self._pipe.recv_bytes_into(block.reshape(-1).view(np.uint8))
            assert received == block.nbytes, (name, received, block.nbytes)
        return block

    def whole(self, name: str) -> Any:
        """The tensor as a float32 array."""
        shape = self.shapes[name]
        return self.rows(name, 0, shape[0] if shape else 1)


def child_environment(folders: Sequence[Path]) -> dict[str, str]:
    """Return the environment of a child process that finds modules in `folders` first, then ours.

    The converter's own gguf-py must win over an installed gguf. Nothing reaches for the hub.
    """
    path = [*map(str, folders), str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    environ.pop("NO_LOCAL_GGUF", None)
    return environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Child:
    """A child process that works on weights of this one; a context manager that ends it, whatever happens.

    Raises:
        CannotExport: on every call after the child has ended.
    """

    def __init__(self, module: str, folders: Sequence[Path], *, what: str) -> None:
        self._module, self._folders, self._what = module, folders, what
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        self._pipe, theirs = Pipe()
        self._log = tempfile.TemporaryFile()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=child_environment(self._folders),
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
        self._log.close()

    def tell(self, message: Message) -> None:
        """Send the child a message.

        Raises:
            CannotExport: it is gone.
        """
        try:
            send(self._pipe, message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._gone() from error

    def until(self, key: str, weights: Weights | None, progress: Callable[[int, int], None] | None = None) -> Any:
        """Serve rows of weights until the child sends a message with `key`; return what it says there.

        Raises:
            CannotExport: the child refused, failed or died.
            ExportMismatch: the child says so.
        """
        while True:
            try:
                message = receive(self._pipe)
                if "rows" in message:
                    assert weights is not None
                    block = weights.rows(message["rows"], message["start"], message["stop"])
                    data = block.contiguous().numpy().reshape(-1).view("uint8")
                    if data.nbytes:
                        self._pipe.send_bytes(data)
            except (EOFError, ConnectionResetError, BrokenPipeError) as error:
                raise self._gone() from error
            if "progress" in message:
                if progress is not None:
                    progress(*message["progress"])
            elif "mismatch" in message:
                raise ExportMismatch(f"{self._what}: {message['mismatch']}")
            elif "refused" in message:
                raise CannotExport(f"{self._what}: {message['refused']}")
            elif "failed" in message:
                raise CannotExport(f"{self._what}: {message['failed']}\n{self._said()}")
            elif key in message:
                return message[key]

    def _gone(self) -> CannotExport:
        assert self._process is not None
        code = self._process.wait()
        why = "probably for want of memory" if code == -9 else f"with status {code}"
        return CannotExport(f"{self._what}: the child process ended {why}. What it said last:\n{self._said()}")

    def _said(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()[-_TAIL:].decode(errors="replace").strip()


def run_child(work: Callable[[Connection], None]) -> None:
    """In the child: do `work` with the pipe whose number is the last argument, and report how it fails."""
    pipe = Connection(int(sys.argv[-1]))
    try:
        work(pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(1)  # nobody waits for the answer
    except (Refused, TrlpatchError) as refused:
        send(pipe, {"refused": str(refused)})
    except Exception as error:
        import traceback

        traceback.print_exc()
        send(pipe, {"failed": f"{type(error).__name__}: {error}"})


class Refused(Exception):
    """In the child: what the user is told, word by word."""
