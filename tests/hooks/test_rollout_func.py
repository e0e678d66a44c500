"""rollout_func on a stub engine; tests/cpu/test_rollout_func.py runs it on a real one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub
from tests.fakes.models import lora_model, randomize
from trlpatch import hooks
from trlpatch.engine.adapter_sync import registry
from trlpatch.engine.attach import attach_engine
from trlpatch.engine.state import state_of
from trlpatch.errors import RolloutFuncIgnored

pytestmark = pytest.mark.torch


class Engine(RecordingEngineStub):
    """Adds its requests through `llm_engine`, as vLLM does."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.llm_engine.add_request = self.add_request

    def add_request(
        self, request_id: str, prompt: str, params: Any = None, arrival: Any = None, lora_request: Any = None
    ) -> None:
        super().generate(lora_request=lora_request)

    def generate(self, prompts: Any = None, *, lora_request: Any = None, **_: Any) -> list[Any]:
        for number, prompt in enumerate(prompts):
            self.llm_engine.add_request(str(number), prompt, lora_request=lora_request)
        return []


class Trainer:
    def __init__(self, engine: Engine, function: Callable[..., Any] | None, *, sleep: bool = False) -> None:
        state_of(engine).adapter_sync = RecordingAdapterSync()
        self.model = attach_engine(lora_model(), engine)
        self.llm = engine
        self.vllm_mode = "colocate"
        self.args = SimpleNamespace(vllm_enable_sleep_mode=sleep)
        self.rollout_func = hooks.rollout_func(self, function)

    def names(self) -> list[str | None]:
        return [None if request is None else request.lora_name for request in self.llm.requests]


def test_a_call_without_a_request_gets_the_adapter_as_it_is() -> None:
    def rolls_out(prompts: list[str], trainer: Trainer) -> dict[str, Any]:
        trainer.llm.generate(prompts)
        randomize(trainer.model, seed=7)
        trainer.llm.llm_engine.add_request("x", "again", None)
        return {"prompt_ids": prompts}

    trainer = Trainer(Engine(), rolls_out)
    assert trainer.rollout_func(["a", "b"], trainer) == {"prompt_ids": ["a", "b"]}
    assert trainer.names() == ["v1", "v1", "v2"]


def test_another_thread_gets_it_too() -> None:
    def rolls_out(prompts: list[str], trainer: Trainer) -> None:
        worker = threading.Thread(target=trainer.llm.generate, args=(prompts,))
        worker.start()
        worker.join()

    trainer = Trainer(Engine(), rolls_out)
    trainer.rollout_func(["a"], trainer)
    assert trainer.names() == ["v1"]


def test_what_is_asked_for_by_name_is_kept() -> None:
    other = SimpleNamespace(lora_name="other")

    def rolls_out(prompts: list[str], trainer: Trainer) -> None:
        trainer.llm.generate(prompts, lora_request=other)
        trainer.model.get_base_model().fast_generate(prompts, lora_request=None)
        with trainer.model.disable_adapter():
            trainer.llm.generate(prompts)
        trainer.model.get_base_model().fast_generate(prompts)

    trainer = Trainer(Engine(), rolls_out)
    trainer.rollout_func(["a"], trainer)
    assert trainer.names() == ["other", None, None, "v1"]


def test_outside_of_it_the_engine_is_vllms_own() -> None:
    def fails(prompts: list[str], trainer: Trainer) -> None:
        raise RuntimeError("environment is gone")

    trainer = Trainer(Engine(), fails)
    with pytest.raises(RuntimeError, match="environment is gone"):
        trainer.rollout_func(["a"], trainer)
    trainer.llm.generate(["a"])
    assert trainer.names() == [None]


def test_a_sleeping_engine_wakes_for_it_and_sleeps_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "names_separate_prefixes", lambda: True)

    def rolls_out(prompts: list[str], trainer: Trainer) -> None:
        trainer.llm.generate(prompts)

    trainer = Trainer(Engine(sleep=True), rolls_out, sleep=True)
    hooks.sleep(trainer, trainer.llm, level=2)
    trainer.rollout_func(["a"], trainer)
    assert trainer.names() == ["v1"]
    assert trainer.llm.calls == [
        "sleep(1)",
        "wake(weights)",
        "wake(kv_cache)",
        "generate(v1, checkpoint)",
        "sleep(1)",
    ]


def test_none_and_servers_are_left_alone() -> None:
    trainer = Trainer(Engine(), lambda prompts, trainer: trainer.llm.generate(prompts))
    trainer.vllm_mode = "server"
    trainer.rollout_func(["a"], trainer)
    assert trainer.names() == [None]
    assert hooks.rollout_func(trainer, None) is None


def test_release_0_25_refuses_what_it_would_not_call(caplog: pytest.LogCaptureFixture) -> None:
    def function() -> None: ...

    def keep(args: Any, model: Any) -> Any:
        return hooks.rollout_func_server(SimpleNamespace(), model, args, function)

    server = SimpleNamespace(use_vllm=True, vllm_mode="server")
    here = SimpleNamespace(use_vllm=True, vllm_mode="colocate")
    assert keep(server, "model") is function
    assert "server mode only" not in caplog.text
    with caplog.at_level(logging.WARNING, "trlpatch"):
        assert keep(here, "model") is function
    assert "TRL 0.25 calls it in server mode only" in caplog.text
    model = attach_engine(lora_model(), Engine())
    with pytest.raises(RolloutFuncIgnored, match="without an attached engine"):
        keep(here, model)
