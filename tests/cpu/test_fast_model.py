"""FastLanguageModel on a real vLLM CPU engine: what it gives, what it refuses, and a training."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

import trlpatch  # noqa: E402
from tests import processes  # noqa: E402
from tests.cpu.fast import PARAMS, SMALL, draw_seeds, random_state, rollout  # noqa: E402
from trlpatch import FastLanguageModel  # noqa: E402
from trlpatch.engine import build, probes  # noqa: E402
from trlpatch.engine.build import lora_arguments  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import (  # noqa: E402
    AdapterNotExpressible,
    CannotShare,
    ConflictingArguments,
    CudaRequired,
    EngineBuildFailed,
    EngineWithoutSleep,
    LoraNotSupported,
    ModelNotFound,
    RankAboveEngine,
    UnknownArgument,
    VllmStyleArguments,
)
from trlpatch.policy.adapter import lora_view  # noqa: E402

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # float32 on both sides
TRAINED_TOLERANCE = 1e-2  # weights that grew for ten steps, and min_p left out of the trainer's probabilities
MOVED = 1e-2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(checkpoint, max_lora_rank=9, **SMALL)


@pytest.fixture
def policy(loaded: tuple[Any, Any]) -> Iterator[Any]:
    """The loaded model with an adapter, which is taken off again."""
    adapted = FastLanguageModel.get_peft_model(loaded[0], r=8, lora_alpha=16)
    yield adapted
    adapted.unload()


def gap(policy: Any, output: Any) -> float:
    theirs = tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)
    return float((tiny.engine_logprobs(output) - theirs).abs().max())


# What is loaded.


def test_the_model_carries_its_engine(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    engine = model.vllm_engine
    assert isinstance(engine, vllm.LLM)
    assert (probes.max_lora_rank(engine), probes.max_model_len(engine)) == (16, 256), "9 is no rank vLLM allows"
    assert probes.logprobs_mode(engine) == "processed_logprobs"
    assert "async_scheduling" not in lora_arguments(16), "vLLM's default, which it turns off on a CPU itself"
    assert probes.executor(engine) is not None, "the worker lives in this process"
    assert model.dtype == torch.float32 == engine.llm_engine.vllm_config.model_config.dtype
    assert not model.training


def test_why_the_weights_are_separate_is_kept(loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    state = state_of(loaded[0].vllm_engine)
    assert not state.shared_weights
    assert "repacked" in (state.why_separate or "")
    report = trlpatch.status()
    assert any("weights separate" in line and "repacked" in line for line in report.engines)
    assert "weights separate" in str(report.full())


def test_the_tokenizer_is_as_trl_wants_it(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<pad>")


def test_a_tokenizer_without_padding_gets_the_end_token(checkpoint: Path, tmp_path: Path) -> None:
    words = tiny.tokenizer()
    words.pad_token = None
    words.padding_side = "right"
    copy = _copied(checkpoint, tmp_path / "model")
    words.save_pretrained(copy)
    for file in (copy / "config.json", copy / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": None}))
    model, tokenizer = FastLanguageModel.from_pretrained(str(copy), fast_inference=False, load_in_4bit=False)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<eos>")
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.eos_token_id


def test_rollouts_use_the_live_adapter(policy: Any) -> None:
    tiny.move(policy, seed=1)
    assert gap(policy, rollout(policy)) < TOLERANCE
    assert gap(policy, rollout(policy, lora_request=None)) > MOVED


def test_an_adapter_is_saved_and_rolled_out_from_its_directory(policy: Any, tmp_path: Path) -> None:
    tiny.move(policy, seed=2)
    policy.save_lora(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (8, 16)
    assert gap(policy, rollout(policy, lora_request=policy.load_lora(str(tmp_path / "saved")))) < TOLERANCE
    tiny.move(policy, seed=3)
    assert gap(policy, rollout(policy, lora_request=policy.load_lora(str(tmp_path / "saved")))) > MOVED
    assert gap(policy, rollout(policy, lora_request=policy.load_lora("any", load_tensors=True))) < TOLERANCE


def test_the_default_adapter(policy: Any) -> None:
    view = lora_view(policy)
    assert view is not None
    config = view.configs["default"]
    assert set(config.target_modules) == set(tiny.TARGETS)
    assert (config.lora_dropout, config.bias, config.task_type) == (0.0, "none", "CAUSAL_LM")
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_gradient_checkpointing_is_the_last_word(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    embeddings = model.get_input_embeddings()
    for wish in ("unsloth", False, True):
        adapted = FastLanguageModel.get_peft_model(model, r=8, use_gradient_checkpointing=wish)
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) is bool(wish)
        assert len(embeddings._forward_hooks) == bool(wish), "one hook, not one per call"
        adapted.train()
        adapted(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
        model = adapted.unload()
    model.eval()


def test_the_seed_makes_the_adapter_and_nothing_else(loaded: tuple[Any, Any]) -> None:
    before = draw_seeds()
    made = []
    for seed in (1, 1, 2):
        adapted = FastLanguageModel.get_peft_model(loaded[0], r=8, random_state=seed)
        made.append(torch.cat([p.detach().flatten() for n, p in adapted.named_parameters() if "lora_A" in n]))
        adapted.unload()
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert random_state() == before


# What an adapter may not be.


@pytest.mark.parametrize("changes", [{"r": 32}, {"r": 8, "rank_pattern": {"q_proj": 32}}])
def test_a_rank_above_the_engines_says_both_numbers(loaded: tuple[Any, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(
        RankAboveEngine, match=r"r=32 is above .*max_lora_rank=16; load the model with max_lora_rank=32"
    ):
        FastLanguageModel.get_peft_model(loaded[0], **changes)
    assert lora_view(loaded[0]) is None


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"r": 0}, ConflictingArguments, "r=0"),
        ({"use_gradient_checkpointing": "trl"}, ConflictingArguments, "use_gradient_checkpointing='trl'"),
        ({"use_rslor": True}, UnknownArgument, "did you mean use_rslora="),
    ],
)
def test_bad_adapter_settings(
    loaded: tuple[Any, Any], changes: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        FastLanguageModel.get_peft_model(loaded[0], **changes)
    assert lora_view(loaded[0]) is None


def test_a_second_adapter_is_refused(policy: Any) -> None:
    with pytest.raises(ConflictingArguments, match=r"has an adapter already; take it off with .model = model.unload"):
        FastLanguageModel.get_peft_model(policy)


def test_an_adapter_that_vllm_cannot_serve(loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    model, _ = loaded
    adapted = FastLanguageModel.get_peft_model(model, r=8, use_dora=True)
    assert "DoRA" in caplog.text
    adapted.unload()
    state = state_of(model.vllm_engine)
    state.shared_weights = True
    try:
        with pytest.raises(AdapterNotExpressible, match=r"DoRA.*share the base weights.*share_weights=False"):
            FastLanguageModel.get_peft_model(model, r=8, use_dora=True)
    finally:
        state.shared_weights = False
    assert not any("lora" in name for name, _ in model.named_parameters()), "nothing of it is left in the model"


# The same calls without an engine.


def test_without_an_engine_transformers_generates(checkpoint: Path, tmp_path: Path) -> None:
    before = draw_seeds()
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(checkpoint), load_in_4bit=False, fast_inference=False, enforce_eager=True
    )
    policy = FastLanguageModel.get_peft_model(model, r=32)
    assert random_state() == before
    assert not hasattr(policy, "vllm_engine")
    tiny.move(policy, seed=1)
    policy.train()
    inputs = tokenizer(["the cat", "one two three four"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    made = policy.fast_generate(**inputs, max_new_tokens=4, do_sample=False)
    assert made.shape == (2, inputs["input_ids"].shape[1] + 4)
    assert policy.training
    with pytest.raises(VllmStyleArguments, match=r"sampling_params= .*max_new_tokens"):
        policy.fast_generate(["the cat"], sampling_params=vllm.SamplingParams(**PARAMS))
    policy.save_lora(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    with pytest.raises(trlpatch.errors.EngineError, match=r"model\.load_adapter"):
        policy.load_lora(str(tmp_path / "saved"))


# What is refused before anything is built.


@pytest.mark.parametrize(
    ("name", "changes", "kind", "says"),
    [
        (None, {"load_in_4bit": True}, CudaRequired, "set load_in_4bit=False"),
        (None, {"load_in_fp8": True}, CudaRequired, "set load_in_fp8=False"),
        (None, {"enable_sleep_mode": True}, EngineWithoutSleep, "sleep mode needs CUDA"),
        (None, {"share_weights": True}, CannotShare, "repacked"),
        (
            None,
            {"max_seq_length": 4096},
            ConflictingArguments,
            r"made for \d+ tokens .* Set max_seq_length=\d+ or less",
        ),
        (
            None,
            {"max_seq_length": 4096, "hf_overrides": {}},
            EngineBuildFailed,
            "max_seq_length=4096 is more than the model was made for",
        ),
        (None, {"max_lora_rank": 1000}, ConflictingArguments, "max_lora_rank=1000 is above 512"),
        (None, {"dtype": "float12"}, ConflictingArguments, "dtype='float12'"),
        (None, {"max_sequences": 3}, UnknownArgument, "max_sequences="),
        ("./missing/model", {}, ModelNotFound, "expected a directory with config.json, found nothing there"),
        ("nobody/none-such", {}, ModelNotFound, "not in the hub's cache, and HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_loaded(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
    changes: dict[str, Any],
    kind: type[Exception],
    says: str,
) -> None:
    real = build.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: object() if n == "bitsandbytes" else real(n, *a))
    with pytest.raises(kind, match=says):
        FastLanguageModel.from_pretrained(name or checkpoint, **{**SMALL, **changes})


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="found none in it"):
        FastLanguageModel.from_pretrained(tmp_path, **SMALL)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ModelNotFound, match=r"is a PEFT adapter of 'some/base' .*not in the hub's cache"):
        FastLanguageModel.from_pretrained(tmp_path, **SMALL)


def test_an_architecture_without_lora_is_found_before_building(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    words = tiny.tokenizer()
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_embd=64, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    monkeypatch.setattr(vllm.LLM, "__init__", lambda *_, **__: pytest.fail("an engine was built"))
    with pytest.raises(LoraNotSupported, match=r"vLLM has no LoRA for GPT2LMHeadModel.*fast_inference=False"):
        FastLanguageModel.from_pretrained(tmp_path, **SMALL)


def test_engine_arguments_are_those_of_the_signature() -> None:
    from vllm.engine.arg_utils import EngineArgs

    assert build.engine_argument_names() == set(inspect.signature(EngineArgs).parameters)


def test_sizes_come_from_the_shapes(checkpoint: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from trlpatch.loading.memory import weight_bytes

    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    held = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    assert weight_bytes(shapes, 2) == 2 * held
    inner = sum(p.numel() for n, p in shapes.named_parameters() if "_proj.weight" in n)
    assert weight_bytes(shapes, 2, bits=4) == int(2 * (held - inner) + inner * 9 / 16)


# Training, as the README says.


@pytest.mark.release
def test_grpo_as_the_readme_shows_it(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    environ = {**os.environ, "PYTHONWARNINGS": "default"}
    done = processes.run_module("tests.cpu.fast_training", [str(out)], env=environ, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert [line for line in done.stderr.splitlines() if line.startswith("trlpatch: ") and " ready in " in line]
    report = json.loads(out.read_text())
    rollouts = report["rollouts"]
    assert report["engines_built"] == 1
    assert report["uses_ours"]
    assert [one["step"] for one in rollouts] == list(range(10))
    assert len({one["adapter"] for one in rollouts} - {None}) == 10
    assert max(one["gap"] for one in rollouts) < TRAINED_TOLERANCE
    assert sum(report["rewards"][-3:]) > sum(report["rewards"][:3])
    assert report["min_p"] == [0.001] * 10


def _copied(checkpoint: Path, where: Path) -> Path:
    import shutil

    return Path(shutil.copytree(checkpoint, where))
