from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.fakes.engine import RecordingEngineStub  # noqa: E402
from trlpatch import hooks  # noqa: E402
from trlpatch.engine.attach import attach_engine  # noqa: E402
from trlpatch.engine.sharing import protect  # noqa: E402
from trlpatch.errors import (  # noqa: E402
    ArgsRequired,
    EngineMismatch,
    EngineWithoutSleep,
    ServerModeSamplingParams,
    SharedWeights,
)
from trlpatch.options import Options  # noqa: E402
from trlpatch.options import activate as set_options  # noqa: E402

pytestmark = pytest.mark.torch


@dataclass
class OldConfig:
    """OnlineDPO below 0.23."""

    use_vllm: bool = False
    temperature: float = 1.0


@dataclass
class ServerByDefault(OldConfig):
    """GRPO 0.23-0.29."""

    vllm_mode: str = "server"
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000
    vllm_enable_sleep_mode: bool = False
    vllm_tensor_parallel_size: int = 1
    vllm_importance_sampling_correction: bool = True
    max_completion_length: int = 64
    vllm_sampling_params: dict[str, Any] | None = None
    top_p: float = 1.0


@dataclass
class ColocateByDefault(ServerByDefault):
    """TRL 1.0 and newer."""

    vllm_mode: str = "colocate"


class GRPOTrainer:
    pass


class NashMDTrainer(GRPOTrainer):
    pass


def carrying(**settings: Any) -> Any:
    return attach_engine(torch.nn.Linear(1, 1), RecordingEngineStub(**settings))


@pytest.mark.parametrize("config", [ServerByDefault, ColocateByDefault])
@pytest.mark.parametrize("sleep", [True, False])
def test_a_carried_engine_switches_vllm_on(config: Any, sleep: bool) -> None:
    args = config()
    for _ in range(2):
        hooks.configure(GRPOTrainer(), carrying(sleep=sleep), args)
    assert (args.use_vllm, args.vllm_mode, args.vllm_enable_sleep_mode) == (True, "colocate", sleep)


def test_fields_that_do_not_exist_are_not_made() -> None:
    args = OldConfig()
    hooks.configure(GRPOTrainer(), carrying(sleep=True), args)
    assert vars(args) == {"use_vllm": True, "temperature": 1.0}


@pytest.mark.parametrize("model", ["some/model", torch.nn.Linear(1, 1), None])
def test_without_an_engine_nothing_changes(model: Any) -> None:
    for args in (ServerByDefault(), ServerByDefault(use_vllm=True), ColocateByDefault(vllm_enable_sleep_mode=True)):
        before = dict(vars(args))
        hooks.configure(GRPOTrainer(), model, args)
        assert vars(args) == before
    hooks.configure(GRPOTrainer(), model, None)


def test_nash_md_and_xpo_are_left_alone_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    trainer = NashMDTrainer()
    for colocate in ("auto", "always"):
        set_options(Options(colocate=colocate))
        args = ServerByDefault()
        hooks.configure(trainer, carrying(), args)
        assert args == ServerByDefault()
    hooks.configure(trainer, carrying(), None)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0] == (
        "NashMDTrainer: the attached engine is not used: TRL generates with transformers for them, not on the engine "
        "they inherit"
    )


def test_nash_md_and_xpo_without_an_engine_are_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    hooks.configure(NashMDTrainer(), "some/model", ServerByDefault())
    assert not caplog.records


def test_never_and_always() -> None:
    set_options(Options(colocate="never"))
    args = ServerByDefault()
    hooks.configure(GRPOTrainer(), carrying(), args)
    assert args == ServerByDefault()
    set_options(Options(colocate="always"))
    hooks.configure(GRPOTrainer(), "some/model", args)
    assert (args.use_vllm, args.vllm_mode, args.vllm_enable_sleep_mode) == (True, "colocate", False)


@pytest.mark.parametrize(
    "args",
    [
        ColocateByDefault(use_vllm=True, vllm_mode="server"),
        ServerByDefault(use_vllm=True, vllm_server_base_url="http://server:8000"),
        ServerByDefault(use_vllm=True, vllm_server_port=8001),
        ServerByDefault(use_vllm=True, vllm_server_host="server"),
    ],
)
def test_an_explicit_server_is_left_alone(args: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = dict(vars(args))
    hooks.configure(GRPOTrainer(), carrying(), args)
    assert vars(args) == before
    assert "args ask for a vLLM server" in caplog.text


def test_sleep_as_asked() -> None:
    set_options(Options(sleep="off"))
    args = ServerByDefault(vllm_enable_sleep_mode=True)
    hooks.configure(GRPOTrainer(), carrying(sleep=True), args)
    assert not args.vllm_enable_sleep_mode


@pytest.mark.parametrize("wish", ["on", "kv"])
def test_sleep_that_is_demanded(wish: Any) -> None:
    set_options(Options(sleep=wish))
    args = ServerByDefault()
    hooks.configure(GRPOTrainer(), carrying(sleep=True), args)
    assert args.vllm_enable_sleep_mode
    args = ColocateByDefault(use_vllm=True)
    hooks.configure(GRPOTrainer(), "some/model", args)
    assert args.vllm_enable_sleep_mode
    for args in (ServerByDefault(), OldConfig()):
        with pytest.raises(EngineWithoutSleep, match=f"sleep='{wish}'.*enable_sleep_mode=True"):
            hooks.configure(GRPOTrainer(), carrying(sleep=False), args)


def test_sleep_that_the_engine_cannot_is_taken_back_loudly(caplog: pytest.LogCaptureFixture) -> None:
    args = ServerByDefault(vllm_enable_sleep_mode=True)
    hooks.configure(GRPOTrainer(), carrying(sleep=False), args)
    assert not args.vllm_enable_sleep_mode
    assert "vllm_enable_sleep_mode=True is set to False" in caplog.text


def test_missing_arguments() -> None:
    with pytest.raises(ArgsRequired, match=r"args=GRPOConfig\(output_dir=\.\.\.\)"):
        hooks.configure(GRPOTrainer(), carrying(), None)


def test_tensor_parallel_size_must_agree() -> None:
    with pytest.raises(EngineMismatch, match="Set vllm_tensor_parallel_size=2"):
        hooks.configure(GRPOTrainer(), carrying(tensor_parallel=2), ServerByDefault())


def test_completions_longer_than_the_engine_allows(caplog: pytest.LogCaptureFixture) -> None:
    hooks.configure(GRPOTrainer(), carrying(max_model_len=64), ServerByDefault())
    assert "max_model_len is 64" in caplog.text


def test_sampling_parameters_set_on_a_built_config_become_a_plain_dict() -> None:
    args = ColocateByDefault(use_vllm=True)
    args.vllm_sampling_params = '{"min_p": 0.1}'  # type: ignore[assignment]
    hooks.configure(GRPOTrainer(), "some/model", args)
    assert args.vllm_sampling_params == {"min_p": 0.1}


def test_sampling_parameters_that_reach_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServerModeSamplingParams):
        hooks.configure(
            GRPOTrainer(), "some/model", ServerByDefault(use_vllm=True, vllm_sampling_params={"min_p": 0.1})
        )
    with caplog.at_level(logging.WARNING, logger="trlpatch"):
        hooks.configure(GRPOTrainer(), "some/model", ServerByDefault(vllm_sampling_params={"min_p": 0.1}))
    assert "vllm_sampling_params has no effect" in caplog.text


def test_a_trainable_base_weight_that_is_the_engines_own_is_refused() -> None:
    model = carrying(sleep=True)
    model.requires_grad_(False)
    protect(model)
    hooks.configure(GRPOTrainer(), model, ColocateByDefault())
    model.weight.requires_grad_(True)
    with pytest.raises(SharedWeights, match="'weight' has requires_grad=True"):
        hooks.configure(GRPOTrainer(), model, ColocateByDefault())


class OtherArguments:
    """No config of this trainer's: `transformers.TrainingArguments`, for one."""


def test_arguments_that_cannot_switch_vllm_on_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ArgsRequired, match=r"args=OtherArguments\(\.\.\.\)\).*no field use_vllm.* Pass GRPOConfig\("):
        hooks.configure(GRPOTrainer(), carrying(), OtherArguments())  # type: ignore[arg-type]
    hooks.configure(GRPOTrainer(), None, OtherArguments())  # type: ignore[arg-type]
    assert not caplog.records
    set_options(Options(colocate="always"))
    hooks.configure(GRPOTrainer(), None, OtherArguments())  # type: ignore[arg-type]
    assert 'colocate="always" has no effect, because OtherArguments has no field use_vllm' in caplog.text
