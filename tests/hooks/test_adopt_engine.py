from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingEngineStub
from tests.fakes.models import base_model, lora_model
from trlpatch import hooks
from trlpatch.engine.attach import attach_engine, attached_engine
from trlpatch.engine.single_adapter.install import marked
from trlpatch.engine.state import state_of
from trlpatch.errors import AdapterNotExpressible
from trlpatch.hooks.trainers import args_of
from trlpatch.options import Options
from trlpatch.options import activate as set_options

pytestmark = pytest.mark.torch


class Owner:
    """Not initialised yet, as trainers are when they build their engine below TRL 0.23."""


def built(model: Any, owner: Any = None, **given: Any) -> dict[str, Any]:
    """The keyword arguments that `LLM` gets."""
    result: dict[str, Any] = hooks.engine(owner or Owner(), model, lambda **kwargs: kwargs)(**{"model": "m", **given})
    return result


def refuse(**_: Any) -> Any:
    raise AssertionError("a second engine was built")


def test_the_attached_engine_is_the_one() -> None:
    engine = RecordingEngineStub()
    model = attach_engine(lora_model(), engine)
    assert hooks.engine(Owner(), model, refuse)(model="m", enable_sleep_mode=True) is engine


@pytest.mark.parametrize("launcher", [{}, {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}])
def test_the_rank_that_trl_writes_for_an_engine_of_its_own_is_taken_back(
    launcher: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)

    def construct(model: Any) -> None:
        hooks.configure(Owner(), model, SimpleNamespace(use_vllm=True))
        for name in names:
            monkeypatch.setenv(name, "7")
        hooks.engine(Owner(), model, lambda **_: None)(model="m")

    construct(attach_engine(lora_model(), RecordingEngineStub()))
    assert {name: os.environ[name] for name in names if name in os.environ} == launcher
    construct(base_model())
    assert [os.environ[name] for name in names] == ["7", "7", "7"], "TRL's own engine wants it"


def test_an_engine_that_another_library_put_on_the_model_counts_as_attached() -> None:
    engine = RecordingEngineStub()
    model = base_model()
    model.vllm_engine = engine
    assert hooks.engine(Owner(), model, refuse)(model="m") is engine
    assert state_of(engine).attached


def test_the_owners_model_counts_more_than_the_argument() -> None:
    plain = attach_engine(base_model(), RecordingEngineStub())
    owner = SimpleNamespace(model=lora_model(plain))
    assert hooks.engine(owner, "some/model", refuse)(model="m") is attached_engine(plain)
    assert built("some/model", SimpleNamespace(model=lora_model()))["enable_lora"]


def test_never_builds_trls_own_engine() -> None:
    set_options(Options(colocate="never"))
    model = attach_engine(base_model(), RecordingEngineStub())
    assert built(model) == {"model": "m"}


@pytest.mark.parametrize("model", ["some/model", base_model(), lora_model(use_dora=True)])
def test_what_gets_no_lora(model: Any) -> None:
    assert built(model, logprobs_mode="raw_logprobs") == {"model": "m", "logprobs_mode": "raw_logprobs"}


@pytest.mark.cpu
@pytest.mark.parametrize(("changes", "rank"), [({"r": 4}, 8), ({"r": 9}, 16), ({"rank_pattern": {"o_proj": 33}}, 64)])
def test_lora_is_added_with_a_legal_rank(changes: dict[str, Any], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as vLLM does for the launcher that TRL names
    found = built(lora_model(**changes), logprobs_mode="processed_logprobs", max_num_seqs=8)
    graphs = found.pop("compilation_config")
    assert graphs["cudagraph_capture_sizes"] == [1, 2, 4, 8]
    lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 8}
    lora |= {"additional_config": marked({})}
    assert found == {"model": "m", "logprobs_mode": "processed_logprobs", "max_num_seqs": 8, **lora}
    told = built(lora_model(**changes), logprobs_mode="processed_logprobs", enforce_eager=True)
    assert told == {"model": "m", "logprobs_mode": "processed_logprobs", "enforce_eager": True, **lora}


@pytest.mark.cpu
def test_the_log_probability_mode_is_added_where_trl_names_none() -> None:
    assert built(lora_model())["logprobs_mode"] == "processed_logprobs"
    assert "logprobs_mode" not in built(base_model())


def test_adapter_options() -> None:
    set_options(Options(adapter="off"))
    assert built(lora_model()) == {"model": "m"}
    set_options(Options(adapter="request"))
    with pytest.raises(AdapterNotExpressible, match="DoRA"):
        built(lora_model(use_dora=True))


def test_a_rank_above_vllms_largest(caplog: pytest.LogCaptureFixture) -> None:
    model = lora_model(rank_pattern={"o_proj": 600})
    assert built(model) == {"model": "m"}
    assert "its rank 600 is above vLLM's largest, 512" in caplog.text


def test_a_failure_with_lora_says_how_to_build_without() -> None:
    def fail(**_: Any) -> Any:
        raise ValueError("Model X does not support LoRA yet.")

    with pytest.raises(ValueError, match="does not support LoRA") as caught:
        hooks.engine(Owner(), lora_model(), fail)(model="m")
    assert 'PatchFastRL(adapter="off")' in caught.value.__notes__[0]


def test_a_generation_object_knows_the_arguments_while_it_is_built() -> None:
    args = SimpleNamespace(vllm_sampling_params={"min_p": 0.1})
    seen = []

    class VLLMGeneration:
        def __init__(self, model: Any) -> None:
            seen.append(args_of(self))

    made = hooks.generation(args, VLLMGeneration)("model")
    assert seen == [args]
    assert args_of(made) is args
    assert args_of(object()) is None
