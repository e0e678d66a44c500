"""vLLM's own server on the CPU backend: what it serves is what transformers computes, and it ends with its parent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cpu import tiny
from tests.serving import made
from trlpatch.serving import Server, serve
from trlpatch.source.locate import find_trl
from trlpatch.source.releases import NEWEST_TESTED

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        find_trl().release != NEWEST_TESTED, reason="starts servers, and TRL has no part in it: newest release only"
    ),
]

OPTIONS = ["--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8"]
FLOAT32 = [*OPTIONS, "--dtype", "float32"]


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


@pytest.fixture(scope="module")
def server(adapter: Path) -> Iterator[Server]:
    with serve(adapter, options=FLOAT32, startup_timeout=300) as running:
        yield running


def test_an_openai_client_gets_completions_and_chats(server: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=server.url, api_key="-")
    assert [model.id for model in client.models.list()] == ["base", "checkpoint-10"]
    completion = client.completions.create(model=server.model, prompt="one two", max_tokens=4, temperature=0)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4
    chat = client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": "one two"}], max_tokens=4
    )
    assert chat.choices[0].message.role == "assistant"


def test_the_curl_line_works(server: Server) -> None:
    done = subprocess.run(server.curl(), shell=True, capture_output=True, encoding="utf-8", check=True, timeout=60)
    assert '"object":"chat.completion"' in done.stdout


def test_the_adapter_is_what_transformers_computes(server: Server) -> None:
    found = server.check()
    assert found.passed, str(found)
    assert found.mean < 1e-4
    assert found.effect is not None
    assert found.effect > 0.1
    assert found.tokens > 60


def test_another_adapter_is_found_out(server: Server, other: Path) -> None:
    found = server.check(other)
    assert not found.passed
    assert found.other_tokens is None
    assert found.mean > 0.1
    assert "NOT the reference" in str(found)


OWNER = """
import json, sys
from trlpatch.serving import serve

server = serve(sys.argv[1], options=sys.argv[3:], name="policy", startup_timeout=300)
right, wrong = server.check(), server.check(sys.argv[2])
print(json.dumps({"pid": server.pid, "right": right.to_dict(), "wrong": wrong.to_dict()}), flush=True)
sys.stdin.read()
"""


def test_a_model_in_half_precision_is_told_from_another_and_ends_with_its_owner(base: Path) -> None:
    """vLLM rounds float32 weights to bfloat16: the bound is a multiple of what that costs in transformers."""
    wrong = tiny.checkpoint(base.parent / "wrong", seed=3)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(base), str(wrong), *OPTIONS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    with owner:
        assert owner.stdout is not None
        found = json.loads(owner.stdout.readline())
        processes = made.group_of(found["pid"])
        owner.send_signal(signal.SIGKILL)
    assert found["right"]["passed"], found
    assert "bfloat16 costs" in found["right"]["why"]
    assert not found["wrong"]["passed"], found
    assert len(processes) >= 2, "the engine core is a process of its own"
    assert made.eventually(lambda: made.group_of(found["pid"]) == [], seconds=60)
