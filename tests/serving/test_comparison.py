"""How log-probabilities are read from each server, and what is made of them; no model is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.serving import made
from trlpatch.errors import ServerFailed
from trlpatch.serving import comparison
from trlpatch.serving.artifact import Artifact, detect
from trlpatch.serving.backends import Launch
from trlpatch.serving.comparison import Comparison, Scored, compare, served_sequences


def by(backend: str) -> Launch:
    return Launch(backend, (), "policy", "/health", dtype="float32")


def test_vllm_tells_those_of_its_prompt_and_of_what_it_samples() -> None:
    def ask(path: str, body: dict[str, Any]) -> Any:
        assert (path, body["model"]) == ("/v1/completions", "policy")
        entries = [None, {"8": {"logprob": -1.0}, "1": {"logprob": -0.1}}, {"9": {"logprob": -2.0}}]
        choice = {"prompt_token_ids": [7, 8, 9], "prompt_logprobs": entries, "token_ids": [4, 5]}
        return {"choices": [{**choice, "logprobs": {"token_logprobs": [-3.0, -4.0]}}]}

    found = served_sequences(ask, by("vllm"))
    assert len(found) == len(comparison.TEXTS)
    assert found[0] == Scored(comparison.TEXTS[0], [7, 8, 9], [4, 5], [-1.0, -2.0, -3.0, -4.0])


def test_llama_cpp_is_asked_for_one_token_at_a_time() -> None:
    def ask(path: str, body: dict[str, Any]) -> Any:
        if path == "/tokenize":
            return {"tokens": [7, 8]}
        step = len(body["prompt"]) - 2
        if step == 3:
            return {"tokens": []}
        # The token at step 1 ends inside a character: llama.cpp tells nothing of it.
        told = [] if step == 1 else [{"id": step, "logprob": -float(step)}]
        return {"tokens": [step], "completion_probabilities": told}

    assert served_sequences(ask, by("xllamacpp"))[0] == Scored(
        comparison.TEXTS[0], [7, 8], [0, 1, 2], [-0.0, None, -2.0]
    )


def test_llama_cpp_python_echoes_its_prompt() -> None:
    def ask(path: str, body: dict[str, Any]) -> Any:
        assert body["echo"]
        return {"choices": [{"logprobs": {"token_logprobs": [None, -1.0, -2.0, -9.0]}}]}

    assert served_sequences(ask, by("llama-cpp-python"))[0] == Scored(comparison.TEXTS[0], None, [], [-1.0, -2.0])


def test_another_form_of_answer_is_an_error_that_says_so() -> None:
    with pytest.raises(ServerFailed, match="vllm reports log-probabilities in an unknown form"):
        served_sequences(lambda path, body: {"choices": []}, by("vllm"))


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return detect(made.model(tmp_path / "m"))


def judged(monkeypatch: pytest.MonkeyPatch, served: Artifact, told: list[float | None], **found: Any) -> Comparison:
    """Compare with a reference that says what `found` holds."""
    answer = {"logprobs": [-1.0, -2.0], "base": None, "rounded": None, "dtype": "float32", "other_tokens": None}
    monkeypatch.setattr(comparison, "_reference", lambda *_: {**answer, **found})
    return compare([Scored("text", [1], [2, 3], told)], by("vllm"), served, served)


def test_float32_has_a_fixed_bound(monkeypatch: pytest.MonkeyPatch, model: Artifact) -> None:
    near = judged(monkeypatch, model, [-1.0001, -2.0])
    assert (near.passed, near.tokens, near.bound) == (True, 2, comparison.FLOOR)
    assert "verdict     within the bound" in str(near)
    far = judged(monkeypatch, model, [-1.0, -2.5])
    assert (far.passed, far.mean, far.largest) == (False, 0.25, 0.5)
    assert "verdict     NOT the reference" in str(far)


def test_half_precision_has_what_it_costs_in_transformers(monkeypatch: pytest.MonkeyPatch, model: Artifact) -> None:
    rounded = {"rounded": [-1.02, -2.02], "dtype": "bfloat16"}
    assert judged(monkeypatch, model, [-1.05, -2.05], **rounded).passed
    assert not judged(monkeypatch, model, [-1.07, -2.07], **rounded).passed


@pytest.mark.parametrize("told", [[math.nan, -2.0], [None, None], [-math.inf, -2.0]])
def test_what_is_no_number_never_passes(
    monkeypatch: pytest.MonkeyPatch, model: Artifact, told: list[float | None]
) -> None:
    assert not judged(monkeypatch, model, told).passed


def test_other_tokens_never_pass(monkeypatch: pytest.MonkeyPatch, model: Artifact) -> None:
    found = judged(monkeypatch, model, [-1.0, -2.0], other_tokens="text")
    assert not found.passed
    assert "different tokens of 'text'" in str(found)


def test_an_adapter_must_be_nearer_than_its_base(monkeypatch: pytest.MonkeyPatch, model: Artifact) -> None:
    """An adapter after few steps moves less than bfloat16 rounds: the bound alone would let its base pass."""
    small = {"rounded": [-1.1, -2.1], "dtype": "bfloat16", "base": [-1.04, -2.04]}
    assert judged(monkeypatch, model, [-1.01, -2.01], **small).passed
    forgotten = judged(monkeypatch, model, [-1.03, -2.03], **small)
    assert forgotten.mean < forgotten.bound
    assert not forgotten.passed
    assert "nearer to its base model: is the adapter applied?" in str(forgotten)
    untrained = judged(monkeypatch, model, [-1.01, -2.01], **{**small, "base": [-1.0, -2.0]})
    assert untrained.passed


def test_a_quantized_file_may_miss_more_the_fewer_bits_it_has(
    monkeypatch: pytest.MonkeyPatch, model: Artifact, tmp_path: Path
) -> None:
    file = detect(made.gguf(tmp_path / "m.gguf"))
    monkeypatch.setattr(comparison, "_reference", lambda *_: {"logprobs": [-1.0], "base": None, "other_tokens": None})
    bounds = {}
    for names in ({"F32"}, {"Q8_0"}, {"Q8_0", "Q6_K"}, {"Q4_K", "Q6_K"}, {"Q2_K", "Q3_K"}, {"IQ2_XS"}):
        monkeypatch.setattr(comparison, "tensor_types", lambda path, names=names: names)
        sequences = [Scored("text", [1], [2], [-1.0])]
        bounds[min(names)] = compare(sequences, by("xllamacpp"), file, model).bound
        assert compare(sequences, by("xllamacpp"), file, file).bound <= comparison.QUANTIZED_ITSELF
    assert bounds == {"F32": 0.01, "Q8_0": 0.05, "Q6_K": 0.15, "Q4_K": 0.6, "Q2_K": 2.0, "IQ2_XS": 2.0}
