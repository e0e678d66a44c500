"""llama.cpp's server through xllamacpp: what it serves of a GGUF file is what transformers computes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.cpu import tiny
from tests.serving import tiny_gguf
from trlpatch.serving import Server, serve
from trlpatch.source.locate import find_trl
from trlpatch.source.releases import NEWEST_TESTED

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        find_trl().release != NEWEST_TESTED, reason="starts servers, and TRL has no part in it: newest release only"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def needs_xllamacpp() -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serve(tiny_gguf.write(model, model.parent / "policy-f32.gguf"), startup_timeout=600) as running:
        yield running


def test_an_openai_client_gets_completions_and_chats(server: Server) -> None:
    from openai import OpenAI

    assert server.backend == "xllamacpp"
    client = OpenAI(base_url=server.url, api_key="-")
    assert [entry.id for entry in client.models.list()] == ["policy-f32"]
    completion = client.completions.create(model=server.model, prompt="one two", max_tokens=4, temperature=0)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4
    chat = client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": "one two"}], max_tokens=4
    )
    assert chat.choices[0].message.role == "assistant"


def test_a_float32_file_is_what_transformers_computes_of_its_checkpoint(server: Server, model: Path) -> None:
    found = server.check(model)
    assert found.passed, str(found)
    assert found.mean < 5e-3
    assert found.tokens > 60


def test_a_quantized_file_is_told_from_one_of_another_checkpoint(model: Path) -> None:
    file = tiny_gguf.write(model, model.parent / "policy-q8_0.gguf", quantized=True)
    with serve(file, startup_timeout=600) as server:
        of_checkpoint = server.check(model)
        of_itself = server.check(stop=True)
    assert of_checkpoint.passed, str(of_checkpoint)
    assert of_checkpoint.why == "what Q8_0 may miss of a checkpoint"
    assert of_itself.passed, str(of_itself)
    assert of_itself.why == "llama.cpp with its own Q8_0 weights"
    other = tiny.checkpoint(model.parent / "other", seed=3)
    done = processes.run(
        [sys.executable, "-m", "trlpatch", "serve", str(file), "--check", "--json", "--reference", str(other)],
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] is False
    assert found["mean"] > 0.2
