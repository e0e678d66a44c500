"""Real processes: a server comes up, ends with all it started, and never outlives who started it."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import ports
from tests.serving import made
from trlpatch.errors import ConflictingArguments, PortTaken, ServerFailed
from trlpatch.serving import Server, Startup, client, health, serve
from trlpatch.serving.child import GUARD, Child

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups are watched as Linux has them")


@pytest.fixture(autouse=True)
def fake_xllamacpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Put the stand-in first on the path of this process and of those it starts; return the file of its child's id."""
    monkeypatch.syspath_prepend(str(made.FAKE))
    monkeypatch.setenv("PYTHONPATH", f"{made.FAKE}{os.pathsep}{ROOT}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    child = tmp_path / "child.pid"
    monkeypatch.setenv("FAKE_SERVER_CHILD", str(child))
    return child


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return made.gguf(tmp_path / "tiny.gguf")


def left_of(child: Path) -> int:
    """Return the process id of what the server leaves, as soon as it has started that."""
    assert made.eventually(child.exists)
    return int(child.read_text(encoding="utf-8"))


def start(path: Path, **words: object) -> Server:
    return serve(path, backend="xllamacpp", startup_timeout=300, **words)  # type: ignore[arg-type]


def test_a_server_answers_and_ends_with_what_it_started(file: Path, fake_xllamacpp: Path, tmp_path: Path) -> None:
    with start(file, options=["--n_ctx", "512", "--sampling.temp=0.5"], name="policy") as server:
        assert server.model == "policy"
        assert server.url.startswith("http://127.0.0.1:")
        answer = server.ask("/v1/models")
        assert (answer["data"], answer["n_ctx"], answer["temp"]) == ([{"id": "policy"}], 512, 0.5)
        assert made.alive(left_of(fake_xllamacpp))
        assert os.getsid(server.pid) != os.getsid(0)
        # said after it answers
        assert made.eventually(lambda: "listening on" in server.log.read_text(encoding="utf-8"))
        assert f"curl {server.url}/completions " in server.curl()
        assert '"model": "policy"' in server.curl()
    assert server.status() is not None
    assert not made.alive(left_of(fake_xllamacpp))
    assert made.group_of(server.pid) == []
    assert not server.log.exists()
    assert not list(tmp_path.glob("trlpatch-serve-*"))
    server.stop()


def test_a_server_outlives_the_thread_that_started_it(file: Path) -> None:
    started: list[Server] = []
    thread = threading.Thread(target=lambda: started.append(start(file)))
    thread.start()
    thread.join()
    with started[0] as server:
        assert not made.eventually(lambda: server.status() is not None, seconds=1)
        assert server.ask("/v1/models")


def test_a_key_is_given_with_every_request(file: Path) -> None:
    with start(file, options=["--api-key", "s3cret"]) as server:
        assert server.ask("/v1/models")
        assert "Authorization: Bearer s3cret" in server.curl()


def test_a_log_that_was_named_is_kept(file: Path, tmp_path: Path) -> None:
    log = tmp_path / "kept.log"
    with start(file, log=log) as server:
        assert server.log == log
        assert made.eventually(lambda: "listening on" in log.read_text(encoding="utf-8"))
    assert "listening on" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("wanted", [False, True])
def test_log_probabilities_are_kept_by_the_server_only_where_they_are_wanted(
    file: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    """llama-cpp-python holds the logits of a whole context for them."""

    def launch(*words: object, logprobs: bool, **more: object) -> None:
        raise ConflictingArguments(str(logprobs))

    monkeypatch.setattr("trlpatch.serving.server.launch", launch)
    with pytest.raises(ConflictingArguments, match=str(wanted)):
        start(file, logprobs=wanted)


def test_a_server_that_dies_says_why(file: Path, fake_xllamacpp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "dies")
    with pytest.raises(ServerFailed) as failed:
        start(file)
    text = str(failed.value)
    assert "xllamacpp ended with status 1 before it answered" in text
    assert (
        "Its log states:\n  0.00.005 E srv  load_model: failed to load model\n  RuntimeError: Failed to init" in text
    )
    assert "\x1b" not in text
    assert Path(text.partition("its log (")[2].partition(")")[0]).is_file()
    assert not made.alive(left_of(fake_xllamacpp))


def test_a_server_that_never_answers_is_ended_after_the_timeout(
    file: Path, fake_xllamacpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "hangs")
    seen: list[Startup] = []

    def wait(startup: Startup) -> None:
        seen.append(startup)
        left_of(fake_xllamacpp)

    clock = itertools.count(step=0.5)
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep))
    with pytest.raises(ServerFailed, match=r"within startup_timeout=4 seconds .*--startup-timeout SECONDS"):
        serve(file, backend="xllamacpp", startup_timeout=4, on_progress=wait)
    assert [(startup.seconds, startup.timeout) for startup in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not made.alive(left_of(fake_xllamacpp))


def test_a_port_that_is_taken_is_said_before_anything_starts(file: Path, fake_xllamacpp: Path) -> None:
    port = ports.claim().vllm
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(PortTaken, match=f"--port {port}: cannot listen there: Address already in use"):
            start(file, port=port)
    assert not fake_xllamacpp.exists()
    with start(file, port=port) as server:
        assert server.url == f"http://127.0.0.1:{port}/v1"


def test_a_chosen_port_is_none_that_the_kernel_gives_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.choose_port("127.0.0.1", None) in range(1024, 32768)
    block = ports.claim()
    taken, free = block.vllm, block.vllm + 1
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken))
        other.listen()
        monkeypatch.setattr(client, "_UNASSIGNED", [taken] * 49 + [free])
        assert client.choose_port("127.0.0.1", None) == free
        monkeypatch.setattr(client, "_UNASSIGNED", [taken] * 50)
        with pytest.raises(PortTaken, match="--port None: cannot listen there: Address already in use"):
            client.choose_port("127.0.0.1", None)
    block.close()


def test_an_option_that_the_server_does_not_know_is_its_reason(file: Path) -> None:
    with pytest.raises(ServerFailed, match=r"--n_cxt: xllamacpp\.CommonParams has no"):
        start(file, options=["--n_cxt", "5"])
    with pytest.raises(ServerFailed, match="--n_ctx many: expected int"):
        start(file, options=["--n_ctx", "many"])
    with pytest.raises(ConflictingArguments, match="--port"):
        start(file, options=["--port", "5"])


def test_an_interrupt_while_it_starts_leaves_nothing(
    file: Path, fake_xllamacpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "hangs")

    def interrupt(startup: Startup) -> None:
        if fake_xllamacpp.exists():  # on a busy machine it takes time
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(file, on_progress=interrupt)
    assert not made.alive(left_of(fake_xllamacpp))
    assert not list(tmp_path.glob("trlpatch-serve-*"))


@pytest.fixture
def command(file: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `trlpatch serve` as a process of its own."""
    running: list[subprocess.Popen[str]] = []

    def run(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "trlpatch", "serve", str(file), "--backend", "xllamacpp", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_and_the_server(
    command: Callable[..., subprocess.Popen[str]], fake_xllamacpp: Path, number: int, status: int
) -> None:
    process = command("--", "--n_ctx", "64")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("curl http://127.0.0.1:")
    assert made.alive(left_of(fake_xllamacpp))
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == status, said
    assert "Traceback" not in said
    assert not made.alive(left_of(fake_xllamacpp))


def test_a_signal_that_is_ignored_stays_ignored(
    command: Callable[..., subprocess.Popen[str]], fake_xllamacpp: Path
) -> None:
    """As `nohup trlpatch serve` has it, and as a shell has Ctrl-C for what runs in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = command()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    assert not made.eventually(lambda: process.poll() is not None, seconds=1)
    assert made.alive(left_of(fake_xllamacpp))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143


def test_a_signal_while_it_starts_ends_both(
    command: Callable[..., subprocess.Popen[str]], fake_xllamacpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "hangs")
    process = command()
    assert process.stderr is not None
    assert process.stderr.readline().startswith("starting, ")
    left = left_of(fake_xllamacpp)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130
    assert not made.alive(left)


def test_the_server_ends_when_the_command_is_killed(
    command: Callable[..., subprocess.Popen[str]], fake_xllamacpp: Path
) -> None:
    process = command()
    assert process.stdout is not None
    assert process.stdout.readline()
    child = left_of(fake_xllamacpp)
    server = os.getpgid(child)
    process.kill()
    process.communicate(timeout=300)
    assert made.eventually(lambda: made.group_of(server) == [])
    assert not made.alive(child)


def test_the_command_ends_when_the_server_does(
    command: Callable[..., subprocess.Popen[str]], fake_xllamacpp: Path
) -> None:
    process = command()
    assert process.stdout is not None
    assert process.stdout.readline()
    os.kill(os.getpgid(left_of(fake_xllamacpp)), signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "xllamacpp ended with status 137. The end of its log" in said
    assert Path(said.partition("its log (")[2].partition(")")[0]).is_file()
    assert not made.alive(left_of(fake_xllamacpp))


def test_the_command_says_what_is_wrong_with_its_words(command: Callable[..., subprocess.Popen[str]]) -> None:
    for words, text in (
        (("extra",), "options of the server follow after --"),
        (("--reference", "x"), "--reference and --json are options of --check"),
        (("--", "--port", "1"), "--port is an option of `trlpatch serve` itself"),
    ):
        process = command(*words)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 2
        assert text in said


def test_a_command_that_ignores_sigterm_is_killed_with_its_group(tmp_path: Path) -> None:
    deaf = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.fork(); print(1, flush=True); time.sleep(600)"
    )
    read, write = os.pipe()
    guard = subprocess.Popen(
        [sys.executable, "-I", str(GUARD), str(os.getpid()), str(write), "0.5", sys.executable, "-c", deaf],
        pass_fds=(write,),
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    os.close(write)
    with os.fdopen(read) as report:
        group = int(report.readline())
    assert guard.stdout is not None
    with guard.stdout:
        assert sorted(guard.stdout.read(4)) == sorted(b"1\n1\n")
    assert len(made.group_of(group)) == 2
    guard.terminate()
    assert guard.wait(300) == 128 + signal.SIGKILL
    assert made.group_of(group) == []


def test_the_server_ends_when_its_guard_is_killed(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", "import os, time; os.fork(); time.sleep(600)"], os.environ)
    assert made.eventually(lambda: len(made.group_of(child.pid)) == 2)
    child._guard.kill()
    child._guard.wait()
    child.stop()
    child.forget_log()
    assert made.eventually(lambda: made.group_of(child.pid) == [])
