"""vLLM's own server on the CPU backend: what it serves is what transformers computes, and it ends with its parent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.cpu import tiny
from tests.serving import made
from trlpatch.source.locate import find_trl
from trlpatch.source.releases import NEWEST_TESTED

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        find_trl().release != NEWEST_TESTED, reason="starts servers, and TRL has no part in it: newest release only"
    ),
]

OPTIONS = ["--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8", "--dtype", "float32"]

SECONDS = 700.0
"""For the server to start, which has 600 of them, or to compare."""

OWNER = """
import json, sys
from trlpatch.serving import serve

server = serve(sys.argv[1], options=sys.argv[2:], startup_timeout=600)
print(json.dumps({"url": server.url, "model": server.model, "pid": server.pid, "curl": server.curl()}), flush=True)
for line in sys.stdin:
    print(json.dumps(server.check(line.strip() or None).to_dict()), flush=True)
"""
"""A process that serves, and compares with every checkpoint that it reads from its stdin."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """As a trainer leaves it: the adapter with the tokenizer."""
    from transformers import AutoTokenizer

    place = base.parent / "checkpoint-10"
    policy = tiny.policy(base, use_rslora=True)
    tiny.move(policy, seed=1)
    policy.save_pretrained(place)
    AutoTokenizer.from_pretrained(base).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    """An adapter of another run on the same base."""
    place = base.parent / "other"
    policy = tiny.policy(base)
    tiny.move(policy, seed=2)
    policy.save_pretrained(place)
    return place


class Owner:
    """The process that serves the adapter, and what it says of its server."""

    def __init__(self, adapter: Path) -> None:
        words = [sys.executable, "-X", "faulthandler", "-c", OWNER, str(adapter), *OPTIONS]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        told = self._read()
        self.url, self.model, self.pid, self.curl = told["url"], told["model"], told["pid"], told["curl"]

    def check(self, reference: Path | None = None) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{reference or ''}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        with processes.limited(self.process, SECONDS):
            line = self.process.stdout.readline()
        assert line, f"the process that serves has ended, or said nothing in {SECONDS:g} s"
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture(scope="module")
def owner(adapter: Path) -> Iterator[Owner]:
    running = Owner(adapter)
    with running.process:
        yield running
        running.process.kill()


def test_an_openai_client_gets_completions_and_chats(owner: Owner) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=owner.url, api_key="-")
    assert [model.id for model in client.models.list()] == ["base", "checkpoint-10"]
    completion = client.completions.create(model=owner.model, prompt="one two", max_tokens=4, temperature=0)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4
    chat = client.chat.completions.create(
        model=owner.model, messages=[{"role": "user", "content": "one two"}], max_tokens=4
    )
    assert chat.choices[0].message.role == "assistant"


def test_the_curl_line_works(owner: Owner) -> None:
    done = subprocess.run(owner.curl, shell=True, capture_output=True, encoding="utf-8", check=True, timeout=300)
    assert '"object":"chat.completion"' in done.stdout


def test_the_adapter_is_what_transformers_computes(owner: Owner) -> None:
    found = owner.check()
    assert found["passed"], found
    assert found["mean"] < 1e-4
    assert found["effect"] > 0.1
    assert found["tokens"] > 60


def test_another_adapter_is_found_out(owner: Owner, other: Path) -> None:
    found = owner.check(other)
    assert not found["passed"]
    assert found["other_tokens"] is None
    assert found["mean"] > 0.1


def test_the_server_and_its_engine_core_end_when_their_owner_is_killed(owner: Owner) -> None:
    assert len(made.group_of(owner.pid)) >= 2, "the engine core is a process of its own"
    owner.process.send_signal(signal.SIGKILL)
    assert made.eventually(lambda: made.group_of(owner.pid) == [])
