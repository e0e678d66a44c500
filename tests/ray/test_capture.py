"""What `LLM.generate` would add is taken, and the engine is as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.ray.fakes import FakeLLM, FakeParams
from trlpatch.ray.capture import additions


def test_additions_are_noted_and_nothing_is_added_or_stepped() -> None:
    llm = FakeLLM()
    params = [FakeParams(3), FakeParams(4)]
    found = additions(llm, "generate", ["a", "b"], params, {"lora_request": "adapter"})
    assert [(one.request_id, one.prompt, one.params, one.named) for one in found] == [
        ("0", "a", params[0], {"lora_request": "adapter"}),
        ("1", "b", params[1], {"lora_request": "adapter"}),
    ]
    assert (llm.llm_engine.running, llm.llm_engine.steps) == ({}, 0)
    assert set(vars(llm.llm_engine)) == set(vars(FakeLLM().llm_engine)), "the engine has its own methods back"
    for one in found:
        one.add_to(llm.llm_engine)
    assert list(llm.llm_engine.running) == ["0", "1"]
    assert llm.llm_engine.running["0"][2] == "adapter"


def test_names_do_not_come_back() -> None:
    llm = FakeLLM()
    names = [one.request_id for _ in range(2) for one in additions(llm, "generate", ["a", "b"], None, {})]
    assert names == ["0", "1", "2", "3"]


def test_a_request_that_was_made_of_a_prompt_goes_by_its_own_name() -> None:
    llm: Any = FakeLLM()

    def generate(prompts: Any, sampling_params: Any, use_tqdm: bool, **_: Any) -> Any:
        llm.llm_engine.add_request("7", SimpleNamespace(request_id="7-abc"), sampling_params, priority=1)
        assert not llm.llm_engine.has_unfinished_requests()

    llm.generate = generate
    (found,) = additions(llm, "generate", ["a"], FakeParams(), {})
    assert (found.request_id, found.named) == ("7-abc", {"priority": 1})


def test_what_fails_leaves_the_engine_as_it_was() -> None:
    llm = FakeLLM()
    own = llm.llm_engine.add_request = lambda *_, **__: "guarded"  # type: ignore[method-assign]
    llm.generate = _fails  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="too long"):
        additions(llm, "generate", ["a"], None, {})
    assert llm.llm_engine.add_request is own
    assert additions(llm, "generate", [], None, {}) == []


def _fails(*_: Any, **__: Any) -> None:
    raise ValueError("too long")
