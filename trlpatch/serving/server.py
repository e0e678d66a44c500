"""A server for what was exported: started, asked, ended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trlpatch.errors import ServerFailed
from trlpatch.serving import comparison
from trlpatch.serving.artifact import Artifact, detect
from trlpatch.serving.backends import Launch, choose, launch
from trlpatch.serving.child import Child
from trlpatch.serving.client import address, ask, choose_port
from trlpatch.serving.health import Startup, wait_until_ready
from trlpatch.serving.names import STARTUP_TIMEOUT


class Server:
    """A running server; a context manager that ends it.

    Attributes:
        url: base URL of its OpenAI API, with `/v1`.
        model: the name that requests give.
        artifact: what it serves.
        backend: who serves it.
        log: where it writes what it says.
    """

    def __init__(self, artifact: Artifact, how: Launch, child: Child, root: str) -> None:
        self.artifact = artifact
        self.model = how.model
        self.backend = how.backend
        self.url = f"{root}/v1"
        self._root = root
        self._how = how
        self._child = child

    @property
    def log(self) -> Path:
        """The file that holds what the server says; gone after `stop()`, unless `serve(log=)` named it."""
        assert self._child.log is not None
        return self._child.log

    @property
    def command(self) -> list[str]:
        """The command that was started."""
        return list(self._child.command)

    @property
    def pid(self) -> int:
        """The server's process id, which is that of its process group, too."""
        return self._child.pid

    def status(self) -> int | None:
        """Return the exit status of the server, None while it runs."""
        return self._child.status()

    def failure(self) -> ServerFailed:
        """Return the error that says how a server ended that nobody asked to."""
        tail = "\n".join(f"  {line}" for line in self._child.tail())
        what = f"{self.backend} ended with status {self.status()}"
        return ServerFailed(f"{what}. The end of its log ({self.log}):\n{tail}")

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON answer to a GET, or with `body` to a POST, of a path below the server's root."""
        return ask(self._root + path, body, key=self._how.key)

    def curl(self) -> str:
        """Return a command that asks the server something."""
        key = f"-H 'Authorization: Bearer {self._how.key}' " if self._how.key else ""
        body: dict[str, Any] = {"model": self.model, "max_tokens": 32}
        if self.artifact.template:
            path, asked = "chat/completions", {**body, "messages": [{"role": "user", "content": "Hello"}]}
        else:
            path, asked = "completions", {**body, "prompt": "Hello"}
        quoted = json.dumps(asked).replace("'", "'\\''")
        return f"curl {self.url}/{path} {key}-H 'Content-Type: application/json' -d '{quoted}'"

    def check(self, reference: str | Path | None = None, *, stop: bool = False) -> comparison.Comparison:
        """Compare the served log-probabilities with those of transformers.

        Args:
            reference: the checkpoint that should be served; by default what is served.
            stop: end the server before transformers loads the reference, which needs memory, too.

        Raises:
            NotServable: `reference` holds nothing that transformers could load.
            ServerFailed: the server does not report log-probabilities, or transformers cannot load the reference.
        """
        wanted = self.artifact if reference is None else detect(reference)
        told = comparison.served_sequences(self.ask, self._how)
        if stop:
            self.stop()
        return comparison.compare(told, self._how, self.artifact, wanted)

    def stop(self) -> None:
        """End the server and every process that it started; may be called again.

        The log of a server that had ended by itself stays: it says why.
        """
        by_itself = self._child.status() is not None
        self._child.stop()
        if not by_itself:
            self._child.forget_log()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    backend: str = "auto",
    base: str | None = None,
    name: str | None = None,
    options: Sequence[str] = (),
    startup_timeout: float = STARTUP_TIMEOUT,
    logprobs: bool = False,
    log: str | Path | None = None,
    environment: dict[str, str] | None = None,
    on_progress: Callable[[Startup], None] | None = None,
) -> Server:
    """Start the server that fits `path` and return it when it answers: `with serve(path) as server: ...`.

    The server ends with `stop()`, at the end of the `with` block, and with this process, however that one ends.

    Args:
        path: a directory of a model or an adapter (a checkpoint of a trainer, say), or a GGUF file.
        host: address to listen on.
        port: port to listen on; a free one by default.
        backend: "vllm", "xllamacpp", "llama-cpp-python", or "auto" for the one that fits.
        base: base model of an adapter, where it is not the one that the adapter names; for a GGUF file under vLLM the
            directory with its tokenizer.
        name: what requests call the model; by default the name of the directory or file.
        options: further options of the server's own command line.
        startup_timeout: seconds until it must have answered.
        logprobs: make llama-cpp-python report log-probabilities, which `check` needs; the others always do.
        log: file for what the server says; by default a temporary one that `stop()` removes.
        environment: variables beside those of this process.
        on_progress: called about every second with how far it is.

    Raises:
        NotServable: `path` holds nothing that a server could load.
        MissingPackage: what would serve it is not installed.
        PortTaken: `port` is in use.
        ConflictingArguments: `options` hold what is an argument here.
        ServerFailed: the server ended, or did not answer in time; nothing of it is left.
    """
    artifact = detect(path, base=base)
    chosen = choose(artifact, backend)
    environ = {**os.environ, **(environment or {})}
    port = choose_port(host, port)
    how = launch(
        artifact, chosen, host=host, port=port, name=name, options=options, environment=environ, logprobs=logprobs
    )
    root = address(host, port)
    child = Child(how.command, environ, None if log is None else Path(log).expanduser().absolute())
    try:
        wait_until_ready(child, how, root, startup_timeout, on_progress)
        _require_model(how, root)
    except ServerFailed:
        child.stop()  # and keep the log, which the message names
        raise
    except BaseException:
        child.stop()
        child.forget_log()
        raise
    return Server(artifact, how, child, root)


def _require_model(how: Launch, root: str) -> None:
    """Make sure that who answers is the server that was started: another may have taken the port meanwhile."""
    names = [model["id"] for model in ask(f"{root}/v1/models", key=how.key)["data"]]
    if how.model not in names:
        raise ServerFailed(f"{root}/v1/models lists {', '.join(names)}, not {how.model}: another server answers there")
