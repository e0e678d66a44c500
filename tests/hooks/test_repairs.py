"""Each repair with the package that needs it and with the one that does not, as far as their shapes go."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trlpatch.hooks import repairs


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a module of the given content where `import` finds it, with its parents."""

    def install(name: str, **content: Any) -> ModuleType:
        parent, _, own = name.rpartition(".")
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if parent and parent not in sys.modules:
            install(parent)
        if parent:
            monkeypatch.setattr(sys.modules[parent], own, module, raising=False)
        return module

    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "transformers", "requests")]:
        monkeypatch.delitem(sys.modules, name)
    return install


class Structured(SimpleNamespace):
    pass


class Guided(SimpleNamespace):
    pass


def test_a_tuple_of_an_absent_package_is_false(installed: Any) -> None:
    found = {"torch": (True, "2.11"), "weave": (False, "N/A")}
    installed(
        "transformers.utils.import_utils",
        _is_package_available=lambda name, return_version=False: (
            found[name] if return_version else (found[name][0], None)
        ),
    )
    assert repairs.is_package_available("weave") is False
    assert repairs.is_package_available("torch") is True
    assert repairs.is_package_available("weave", return_version=True) == (False, "N/A")
    assert repairs.is_package_available("torch", return_version=True) == (True, "2.11")


def test_a_bool_of_older_transformers_stays(installed: Any) -> None:
    installed(
        "transformers.utils.import_utils", _is_package_available=lambda name, return_version=False: name == "torch"
    )
    assert repairs.is_package_available("torch") is True
    assert repairs.is_package_available("weave") is False


def test_vllms_tokenizer_module_is_used_where_it_is(installed: Any) -> None:
    own = installed("vllm.transformers_utils.tokenizer")
    assert repairs.vllm_tokenizer() is own


def test_without_the_module_the_assignment_goes_nowhere(installed: Any) -> None:
    parent = installed("vllm.transformers_utils")
    repairs.vllm_tokenizer().get_cached_tokenizer = len
    assert not hasattr(parent, "tokenizer")


def absent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(repairs.importlib, "import_module", fails)


def test_the_adapter_of_requests_or_none(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("requests.adapters", HTTPAdapter=Structured)
    assert repairs.http_adapter() is Structured
    absent("requests", monkeypatch)
    assert repairs.http_adapter() is None


def test_the_weight_sender_with_and_without_the_class_that_vllm_0_28_took_out(installed: Any) -> None:
    installed("vllm.distributed.weight_transfer.nccl_engine", NCCLWeightTransferEngine=Structured)
    assert repairs.weight_sender() == (None, Structured)
    installed(
        "vllm.distributed.weight_transfer.nccl_engine",
        NCCLWeightTransferEngine=Structured,
        NCCLTrainerSendWeightsArgs=Guided,
    )
    assert repairs.weight_sender() == (Guided, Structured)


def test_another_absent_module_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    absent("torch", monkeypatch)
    for hook in (repairs.vllm_tokenizer, repairs.http_adapter):
        with pytest.raises(ModuleNotFoundError, match="torch"):
            hook()


def test_old_vllm_keeps_its_guided_decoding(installed: Any) -> None:
    installed("vllm.sampling_params", GuidedDecodingParams=Guided, StructuredOutputsParams=Structured)
    assert repairs.guided_decoding_params() is Guided
    assert repairs.guided_decoding_field() == "guided_decoding"


@pytest.mark.parametrize("given", [{"regex": "a+"}, {"backend": "outlines", "regex": "a+"}])
def test_new_vllm_gets_structured_outputs(installed: Any, given: dict[str, str]) -> None:
    installed("vllm.sampling_params", StructuredOutputsParams=Structured)
    assert repairs.guided_decoding_params()(**given) == Structured(regex="a+")
    assert repairs.guided_decoding_field() == "structured_outputs"


def test_warnings_go_to_the_model_or_nowhere() -> None:
    old, new = SimpleNamespace(warnings_issued={}), SimpleNamespace()
    for model in (old, new):
        repairs.warnings_issued(model)["estimate_tokens"] = True
    assert old.warnings_issued == {"estimate_tokens": True}
    assert not hasattr(new, "warnings_issued")


@pytest.mark.parametrize(("checked", "unset"), [(False, None), (True, True)], ids=["transformers 4", "transformers 5"])
def test_use_cache_is_what_was_given_or_what_configs_take(installed: Any, checked: bool, unset: bool | None) -> None:
    config = type("PretrainedConfig", (), {})
    installed("transformers", PretrainedConfig=dataclasses.dataclass(config) if checked else config)
    assert repairs.use_cache({}) is unset
    assert repairs.use_cache({"use_cache": False}) is False


def test_a_trainer_without_apex_does_not_use_it() -> None:
    assert repairs.use_apex(SimpleNamespace(use_apex=True))
    assert not repairs.use_apex(SimpleNamespace())


def test_values_are_gathered_by_the_trainer_or_by_the_function_that_it_called(installed: Any) -> None:
    own = SimpleNamespace(_nested_gather=lambda tensors: ("own", tensors), args=None)
    assert repairs.nested_gather(own)(1) == ("own", 1)
    installed("transformers.trainer_pt_utils", nested_gather=lambda tensors, mode: (tensors, mode))
    bare = SimpleNamespace(args=SimpleNamespace(parallel_mode="none"))
    assert repairs.nested_gather(bare)(1) == (1, "none")


def test_seed_worker_gets_what_its_signature_asks_for() -> None:
    calls: list[tuple[int, ...]] = []
    trainer = SimpleNamespace(args=SimpleNamespace(dataloader_num_workers=3, process_index=1))

    def old(worker_id: int) -> None:
        calls.append((worker_id,))

    def new(worker_id: int, num_workers: int, rank: int) -> None:
        calls.append((worker_id, num_workers, rank))

    assert repairs.seed_worker(trainer, old) is old
    repairs.seed_worker(trainer, new)(7)
    assert calls == [(7, 3, 1)]


def test_an_option_that_is_none_gives_no_values() -> None:
    values = {"n": 1}
    assert repairs.given(values) is values
    assert repairs.given(None) == {}


def test_text_is_not_prepared_as_messages() -> None:
    prepare = repairs.messages_only(lambda messages: [*messages, "prepared"])
    assert prepare("text") == "text"
    assert prepare([{"role": "user"}]) == [{"role": "user"}, "prepared"]


@pytest.mark.parametrize(("value", "expected"), [(None, -1), (0, -1), (-1, -1), (1, 1), (50, 50)])
def test_no_limit_of_top_k_is_minus_one(value: int | None, expected: int) -> None:
    assert repairs.top_k(value) == expected


class OldSamplingParams:
    def __init__(self, n: int = 1, truncate_prompt_tokens: int | None = None) -> None: ...


class NewSamplingParams:
    def __init__(self, n: int = 1) -> None: ...


def engine(max_model_len: int) -> Any:
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))


def test_old_sampling_params_take_the_prompt_limit(installed: Any) -> None:
    installed("vllm", SamplingParams=OldSamplingParams)
    assert repairs.sampling_limit(8) == {"truncate_prompt_tokens": 8}
    assert repairs.sampling_limit(None) == {"truncate_prompt_tokens": None}
    assert repairs.prompt_limit(engine(64), 8) == {}


def test_with_new_ones_the_rollout_takes_it(installed: Any) -> None:
    installed("vllm", SamplingParams=NewSamplingParams)
    assert repairs.sampling_limit(8) == {}
    assert repairs.prompt_limit(engine(64), 8) == {"tokenization_kwargs": {"truncate_prompt_tokens": 8}}
    assert repairs.prompt_limit(engine(64), None) == {}


def test_a_limit_that_the_engine_cannot_reach_is_left_out(installed: Any) -> None:
    installed("vllm", SamplingParams=NewSamplingParams)
    assert repairs.prompt_limit(engine(64), 64) == {}
    assert repairs.prompt_limit(engine(64), 512) == {}
