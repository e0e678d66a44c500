"""What `configure` warns of when a trainer is built: sampling with which it would train on and not learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.fakes.engine import RecordingEngineStub  # noqa: E402
from trlpatch import hooks  # noqa: E402
from trlpatch.engine.attach import attach_engine  # noqa: E402
from trlpatch.errors import ProtectedSamplingParam  # noqa: E402
from trlpatch.log import forget_translations, translations  # noqa: E402
from trlpatch.options import Options, activate  # noqa: E402
from trlpatch.trl_names import CORRECTION_LEFT_OUT  # noqa: E402

pytestmark = pytest.mark.torch

RAW, PROCESSED = "raw_logprobs", "processed_logprobs"
EOS, OTHER_EOS = 2, 7


@pytest.fixture(autouse=True)
def _no_compat() -> Iterator[None]:
    yield
    activate(None)
    forget_translations()


@dataclass
class GRPOConfig:
    """TRL 1.16, in what it says about sampling and engines."""

    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_server_port: int = 8000
    vllm_tensor_parallel_size: int = 1
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = None
    vllm_model_impl: str = "vllm"
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_structured_outputs_regex: str | None = None
    vllm_sampling_params: Any = None
    generation_kwargs: dict[str, Any] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_generations: int = 8
    mask_truncated_completions: bool = False

    def __post_init__(self) -> None:
        hooks.normalize_sampling(self)


class OnlineDPOConfig(GRPOConfig):
    pass


class Below024:
    pass


class GRPOTrainer:
    """0.24 to 1.14.1."""

    def _generate_single_turn(self) -> None:
        pass


class KnowsAllEnds(GRPOTrainer):
    """1.14.2."""

    def __init__(self) -> None:
        self.eos_token_ids = [EOS, OTHER_EOS]


Below024.__name__ = "GRPOTrainer"


def built(
    args: Any,
    caplog: pytest.LogCaptureFixture,
    *,
    trainer: Any = None,
    eos: Any = EOS,
    tokenizer: bool = True,
    attributes: dict[str, Any] | None = None,
    **engine: Any,
) -> list[str]:
    """Build a trainer with it twice; return the warnings."""
    stub = RecordingEngineStub(**engine)
    if tokenizer:
        stub.get_tokenizer = lambda: SimpleNamespace(eos_token_id=EOS, eos_token="</s>")  # type: ignore[attr-defined]
    vars(stub).update(attributes or {})
    stub.llm_engine.vllm_config.cache_config = SimpleNamespace(gpu_memory_utilization=0.6)
    model = attach_engine(torch.nn.Linear(1, 1), stub)
    model.generation_config = SimpleNamespace(eos_token_id=eos)
    caplog.clear()
    trainer = trainer or GRPOTrainer()
    for _ in range(2):
        hooks.configure(trainer, model, args)
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


RESHAPING = [
    {"min_p": 0.1},
    {"top_p": 0.9},
    {"top_k": 20},
    {"logit_bias": {"7": 5.0}},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0},
    {"frequency_penalty": 1.0},
    {"bad_words": ["the"]},
    {"allowed_token_ids": [3, 4]},
    {"min_tokens": 4},
    {"structured_outputs": {"regex": "a+"}},
]


@pytest.mark.parametrize("given", RESHAPING, ids=lambda given: next(iter(given)))
@pytest.mark.parametrize("place", ["vllm_sampling_params", "generation_kwargs"])
def test_a_ratio_of_two_distributions(given: Any, place: str, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = built(GRPOConfig(**{place: given}), caplog, logprobs_mode=PROCESSED)
    name, value = next(iter(given.items()))
    assert f"with {name}={value!r} ({place}) TRL's importance sampling correction" in said
    assert "'sequence_mask'" in said
    assert said.count("vllm_importance_sampling_correction=False") == said.count('logprobs_mode="raw_logprobs"') == 1
    assert not built(GRPOConfig(**{place: given}), caplog, logprobs_mode=RAW), "both are of all tokens"
    off = GRPOConfig(**{place: given}, vllm_importance_sampling_correction=False)
    assert not built(off, caplog, logprobs_mode=PROCESSED)


def _left_out(**given: Any) -> GRPOConfig:
    """As with compat="on" (tests/runtime/test_compat.py)."""
    args = GRPOConfig(**given)
    vars(args)[CORRECTION_LEFT_OUT] = True
    return args


def test_compat_turns_a_correction_off_that_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    activate(Options(compat="on"))
    args = _left_out(min_p=0.1)
    (said,) = built(args, caplog, logprobs_mode=PROCESSED)
    assert args.vllm_importance_sampling_correction is False
    assert "with min_p=0.1 TRL's importance sampling correction" in said
    assert "vllm_importance_sampling_correction=False is set" in said
    assert [said] == translations()
    assert not built(_left_out(min_p=0.1), caplog, logprobs_mode=PROCESSED), "it is said once"


@pytest.mark.parametrize("mode", [RAW, PROCESSED])
def test_compat_leaves_a_correction_that_does_no_harm(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    activate(Options(compat="on"))
    args = _left_out(**({"min_p": 0.1} if mode == RAW else {}))
    assert not built(args, caplog, logprobs_mode=mode)
    assert args.vllm_importance_sampling_correction


@pytest.mark.parametrize("who", ["the user said it", "compat is off", "batches are generated ahead"])
def test_a_correction_is_turned_off_for_nobody_else(who: str, caplog: pytest.LogCaptureFixture) -> None:
    activate(Options(compat="off" if who == "compat is off" else "on"))
    args = GRPOConfig(min_p=0.1) if who == "the user said it" else _left_out(min_p=0.1)
    ahead = {"prefetch": 1} if who == "batches are generated ahead" else {}
    (said,) = built(args, caplog, attributes=ahead, logprobs_mode=PROCESSED)
    assert "Either set vllm_importance_sampling_correction=False" in said
    assert args.vllm_importance_sampling_correction
    assert not translations()


@pytest.mark.parametrize("given", [{"min_p": 0.1}, {"top_k": 20}, {"vllm_structured_outputs_regex": "a+"}])
def test_trls_own_fields_do_the_same(given: Any, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = built(GRPOConfig(**given), caplog)
    assert "weights completions by a ratio that is not near 1" in said


def test_the_engine_that_trl_builds_has_processed_ones(caplog: pytest.LogCaptureFixture) -> None:
    hooks.configure(GRPOTrainer(), "some/model", GRPOConfig(use_vllm=True, min_p=0.1))  # type: ignore[arg-type]
    assert "ratio that is not near 1" in caplog.text
    assert "raw_logprobs" not in caplog.text, "nobody can say that to TRL"


def test_neither_way_is_right_at_another_temperature(caplog: pytest.LogCaptureFixture) -> None:
    for mode in (RAW, PROCESSED):
        (said,) = built(GRPOConfig(min_p=0.1, temperature=0.7), caplog, logprobs_mode=mode)
        assert "Either set vllm_importance_sampling_correction=False, or leave it out" in said
        assert 'logprobs_mode="raw_logprobs"' not in said
    (said,) = built(GRPOConfig(temperature=0.7), caplog, logprobs_mode=RAW)
    assert "the correction is biased" in said


@pytest.mark.parametrize(
    "args",
    [
        GRPOConfig(),
        GRPOConfig(temperature=0.7),
        GRPOConfig(vllm_sampling_params={"min_p": 0.0, "top_k": -1, "top_p": 1.0, "bad_words": [], "max_tokens": 9}),
        GRPOConfig(vllm_sampling_params={"stop": ["x"]}),
        GRPOConfig(generation_kwargs={"presence_penalty": 0, "logit_bias": None}),
        GRPOConfig(top_k=20, vllm_sampling_params={"top_k": 0}),
    ],
)
def test_what_changes_nothing_is_not_worth_a_word(args: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert not built(args, caplog, logprobs_mode=PROCESSED)


def test_a_seed_among_trls_own_arguments_is_told(caplog: pytest.LogCaptureFixture) -> None:
    seeded = {"seed": 3407}
    with pytest.raises(ProtectedSamplingParam) as refused:
        GRPOConfig(vllm_sampling_params=seeded)
    (said,) = built(GRPOConfig(generation_kwargs=seeded), caplog)
    assert said.startswith("GRPOTrainer: generation_kwargs sets seed=3407: vLLM would seed every request")
    assert said.split("seed=3407", 1)[1] in str(refused.value), "in the same words"
    assert not built(OnlineDPOConfig(generation_kwargs=seeded), caplog), "n=2, and vLLM seeds the second with seed + 1"
    assert not built(GRPOConfig(generation_kwargs=seeded, num_generations=1), caplog)


@pytest.mark.parametrize("given", [{"temperature": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"allowed_token_ids": [3]}])
def test_one_token_to_sample_is_one_completion(given: Any, caplog: pytest.LogCaptureFixture) -> None:
    said = built(GRPOConfig(vllm_sampling_params=given, vllm_importance_sampling_correction=False), caplog)
    assert len([one for one in said if "every advantage is zero" in one]) == 1
    args = GRPOConfig(vllm_sampling_params=given, vllm_importance_sampling_correction=False, num_generations=1)
    assert not [one for one in built(args, caplog) if "every advantage is zero" in one]


@pytest.mark.parametrize("place", ["vllm_sampling_params", "generation_kwargs"])
def test_another_temperature_is_told_when_the_trainer_is_built(place: str, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = built(GRPOConfig(**{place: {"temperature": 0.5}}), caplog, logprobs_mode=PROCESSED)
    assert "sampled at temperature 0.5" in said


@pytest.mark.parametrize("place", ["vllm_sampling_params", "generation_kwargs"])
@pytest.mark.parametrize("stops", [{"stop": "x"}, {"stop": ["</s>", "x"]}, {"stop_token_ids": [EOS, 5]}])
def test_a_stop_counts_as_truncated(place: str, stops: Any, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = built(GRPOConfig(mask_truncated_completions=True, **{place: stops}), caplog)
    assert f"{place} sets {next(iter(stops))}=" in said
    assert "nothing is learned from them" in said
    assert not built(GRPOConfig(**{place: stops}), caplog), "only masked completions are lost"
    args = GRPOConfig(mask_truncated_completions=True, **{place: stops})
    assert not built(args, caplog, trainer=Below024()), "is refused or told at the first rollout"


@pytest.mark.parametrize("stops", [{"stop": "</s>"}, {"stop": ["</s>"]}, {"stop_token_ids": [EOS]}, {"stop": []}])
def test_eos_may_be_named_as_a_stop(stops: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert not built(GRPOConfig(mask_truncated_completions=True, vllm_sampling_params=stops), caplog)


def test_several_eos(caplog: pytest.LogCaptureFixture) -> None:
    masked, several = GRPOConfig(mask_truncated_completions=True), [EOS, OTHER_EOS]
    (said,) = built(masked, caplog, eos=several)
    assert "eos_token_id=[2, 7]" in said
    assert "end otherwise (7)" in said
    assert "takes for truncated and masks them" in said
    (said,) = built(GRPOConfig(mask_truncated_completions=True), caplog, eos=OTHER_EOS)
    assert "end otherwise (7)" in said, "vLLM ends at the tokenizer's as well"
    (said,) = built(GRPOConfig(mask_truncated_completions=True), caplog, eos=several, tokenizer=False)
    assert "Those that end otherwise it takes" in said
    (said,) = built(GRPOConfig(), caplog, eos=several, trainer=Below024())
    assert "does not see the end of, and trains on the padding" in said
    for args, trainer, eos in (
        (GRPOConfig(mask_truncated_completions=True), KnowsAllEnds(), several),
        (GRPOConfig(), GRPOTrainer(), several),
        (GRPOConfig(mask_truncated_completions=True), GRPOTrainer(), [EOS]),
        (GRPOConfig(mask_truncated_completions=True), GRPOTrainer(), None),
        (
            GRPOConfig(mask_truncated_completions=True, generation_kwargs={"stop_token_ids": [7]}),
            KnowsAllEnds(),
            several,
        ),
    ):
        assert not built(args, caplog, trainer=trainer, eos=eos)


def test_arguments_for_an_engine_that_is_built(caplog: pytest.LogCaptureFixture) -> None:
    args = GRPOConfig(vllm_gpu_memory_utilization=0.9, vllm_max_model_length=512, vllm_server_port=8001)
    args.vllm_model_impl = "transformers"
    (said,) = built(args, caplog)
    assert said == (
        "GRPOTrainer: these arguments have no effect, because the attached engine is built: vllm_server_port=8001, "
        "vllm_gpu_memory_utilization=0.9 (the engine has 0.6), vllm_max_model_length=512 (the engine has 256), "
        "vllm_model_impl='transformers'. Give them to vllm.LLM or to FastLanguageModel.from_pretrained"
    )
    assert not built(GRPOConfig(vllm_gpu_memory_utilization=0.6, vllm_max_model_length=256), caplog), "as it is built"
    caplog.clear()
    hooks.configure(GRPOTrainer(), "some/model", GRPOConfig(use_vllm=True, vllm_max_model_length=512))  # type: ignore[arg-type]
    assert not caplog.records, "TRL builds an engine with them"


@pytest.mark.parametrize("text", ["null", "None", "none", " null ", ""])
def test_nothing_on_a_command_line(text: str) -> None:
    assert GRPOConfig(vllm_sampling_params=text).vllm_sampling_params is None


def test_a_value_of_none_leaves_trls_own() -> None:
    given = '{"min_p": null, "temperature": null, "presence_penalty": null, "stop": null, "top_k": 3}'
    assert GRPOConfig(vllm_sampling_params=given).vllm_sampling_params == {"stop": None, "top_k": 3}


def test_ids_of_a_command_line_are_numbers() -> None:
    args = GRPOConfig(vllm_sampling_params='{"logit_bias": {"7": 5.0}}')
    assert hooks.sampling_params(args, dict)() == {"logit_bias": {7: 5.0}}
