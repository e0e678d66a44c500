"""Processes that start warm: forked from one that has imported torch, transformers, peft and vLLM before.

Importing those takes 13 of the 20 seconds of a short training (5,000 modules; vLLM 0.28, transformers 5.23, one core).
The process that forks has no engine, no thread, no TRL and no trlpatch: what a test is about is imported by each run.

    python -m tests.warm serve SOCKET PIPE [MODULE ...]    descriptors of the socket to listen on and of a pipe, at
                                                           whose end it ends, and what to import
    python -m tests.warm run MODULE [ARGUMENT ...]         what `python -m MODULE ARGUMENT ...` does, for a launcher

`serving` starts it, which tests/cpu/stack.py does for a tier with engines; `available` says whether one is there.
What depends on how a process starts (launchers, the order of imports, another PYTHONPATH) has to start a fresh one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from tests import ports

MODULES = (
    "accelerate",
    "datasets",
    "libcst",
    "peft",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.trainer",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen2",
)
"""What a training imports, but for TRL and trlpatch.

vLLM's in its own order: the CPU worker of 0.23 exchanges functions that models import by name.
"""

VARIABLE = "TRLPATCH_TEST_WARM"
"""Names the socket, for the processes of pytest."""

HUB = "TRLPATCH_TEST_HUB"
"""Names the HF_HOME of warm processes, to them: huggingface_hub has read it. It is theirs together, and temporary."""

_SOCKET = os.environ.get(VARIABLE)  # a test's environment has no TRLPATCH_ variables


def available() -> bool:
    """Whether processes can be started warm here."""
    return _SOCKET is not None


def variables() -> dict[str, str]:
    """Return what tells a process that a test starts where `run` finds the one that forks; nothing where none does."""
    return {} if _SOCKET is None else {VARIABLE: _SOCKET}


class Process:
    """A warm process, as far as `subprocess.Popen` is needed. It does not outlive the one that started it.

    Attributes:
        pid: its number; it leads a session, which what it forks is in.
        returncode: None until it was waited for; below zero for a signal.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], out: IO[bytes], err: IO[bytes]
    ) -> None:
        """Run `python -m module *arguments` with what it says in two files.

        Raises:
            AssertionError: the process that forks has ended.
        """
        assert _SOCKET is not None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_SOCKET)
        own = ports.environment() if "VLLM_PORT" in env else {}
        if "TORCHELASTIC_RUN_ID" in env:  # ranks meet at the launcher's port
            own.pop("MASTER_PORT", None)
        environ = {**env, **own}
        request = {"module": module, "arguments": list(arguments), "cwd": str(cwd), "env": environ}
        socket.send_fds(self._connection, [b"!"], [out.fileno(), err.fileno()])
        self._connection.sendall(f"{json.dumps(request)}\n".encode())
        self._answers = self._connection.makefile("r", encoding="ascii")
        self.returncode: int | None = None
        self.pid = self._next()

    def wait(self, timeout: float | None = None) -> int:
        """Return its status.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
            AssertionError: the process that forks has ended.
        """
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(f"warm process {self.pid}", timeout or 0.0)
            self.returncode = self._next()
            self._answers.close()
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return its status, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _next(self) -> int:
        line = self._answers.readline()
        assert line, "the process that forks warm ones has ended; its output is that of this one's parent"
        return int(line)


@contextlib.contextmanager
def serving(
    python: Path, cwd: Path, env: Mapping[str, str], modules: Sequence[str] = MODULES
) -> Iterator[dict[str, str]]:
    """Start the process that forks, with an interpreter and an environment; yield the variables that tell of it."""
    with (
        tempfile.TemporaryDirectory(prefix="warm-") as folder,
        socket.socket(socket.AF_UNIX) as listener,
        contextlib.ExitStack() as stack,
    ):
        path = f"{folder}/socket"
        listener.bind(path)
        listener.listen(64)
        life, ours = os.pipe()  # at its end the process ends, however this one ends
        stack.callback(os.close, ours)
        places = {"HOME": folder, "XDG_CACHE_HOME": f"{folder}/cache", "HF_HOME": f"{folder}/hub-home"}
        environ = {**env, **places, "PYTHONWARNINGS": "default"}
        passed = listener.fileno(), life
        command = [str(python), "-X", "faulthandler", "-m", "tests.warm", "serve", *map(str, passed), *modules]
        process = subprocess.Popen(command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, pass_fds=passed)
        os.close(life)
        listener.close()
        try:
            yield {VARIABLE: path}
        finally:
            process.kill()
            process.wait()


def run(module: str, arguments: Sequence[str]) -> NoReturn:
    """Be the warm process for whoever started this one, a fresh one where none forks."""
    if not available():
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    environ = {name: value for name, value in os.environ.items() if name != VARIABLE}
    status = Process(module, arguments, Path.cwd(), environ, sys.stdout.buffer, sys.stderr.buffer).wait()
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


def serve(listener: socket.socket, life: int, modules: Sequence[str]) -> None:
    """Import modules, fork for each request, and in the child run what was asked for."""
    for name in modules:
        importlib.import_module(name)
    asked = _child(listener, life)
    sys.path[0] = asked["cwd"]
    sys.argv[1:] = asked["arguments"]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


def _child(listener: socket.socket, life: int) -> dict[str, Any]:
    """Tell each connection the number of its child and, later, its status; return in the child, with the request."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, "asked")
    selector.register(life, selectors.EVENT_READ, "alone")
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of the child's end
    while True:
        for key, _ in selector.select():
            if key.data == "alone":
                os._exit(0)
            elif key.data == "left":
                for pid, connection in running.values():  # none where it has ended just now
                    if connection is key.fileobj:
                        selector.unregister(connection)
                        os.kill(pid, signal.SIGKILL)
            elif key.data == "ended":
                pid, connection = running.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError), connection:
                    connection.sendall(f"{status}\n".encode())
            else:
                connection, _ = listener.accept()
                _, files, _, _ = socket.recv_fds(connection, 1, 2)
                with connection.makefile("rb") as lines:
                    request = json.loads(lines.readline())
                if not (pid := os.fork()):
                    for file, (_, other) in running.items():
                        os.close(file)
                        other.close()
                    for ended in (selector, listener, connection):
                        ended.close()
                    os.close(life)
                    return _become(request, files)
                for file in files:
                    os.close(file)
                connection.sendall(f"{pid}\n".encode())
                file = os.pidfd_open(pid)
                running[file] = pid, connection
                selector.register(file, selectors.EVENT_READ, "ended")
                selector.register(connection, selectors.EVENT_READ, "left")


def _become(request: dict[str, Any], files: list[int]) -> dict[str, Any]:
    """Take the session, the output, the environment and the place of the run."""
    os.setsid()
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    hub = os.environ["HF_HOME"]
    os.environ.clear()
    os.environ.update({**request["env"], HUB: hub})
    os.chdir(request["cwd"])
    return request


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2], sys.argv[3:])
    serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]), sys.argv[4:])
