"""Reuse of old log-probabilities: TRL's formulas are written out again here, on whole batches, as TRL has them."""

from __future__ import annotations

import re
import sys
import weakref
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import base_model, lora_model  # noqa: E402
from trlpatch import hooks  # noqa: E402
from trlpatch.errors import StaleOldLogps  # noqa: E402
from trlpatch.hooks.old_logps import describe  # noqa: E402
from trlpatch.hooks.on_policy import reason_against  # noqa: E402

pytestmark = pytest.mark.torch

ROWS, TOKENS, SLICES = 8, 5, 2


class Trainer:
    """As much of TRL's trainers as the hooks look at."""

    def __init__(self, model: Any = None, *, gas: int = SLICES, **fields: Any) -> None:
        self.model = model if model is not None else base_model()
        self.model.train()
        self.args = SimpleNamespace(gradient_accumulation_steps=gas, steps_per_generation=SLICES)
        self.num_iterations = 1
        self.beta = 0.0
        self.use_vllm = self.vllm_importance_sampling_correction = True
        self.vllm_importance_sampling_mode = "token_truncate"
        self.vllm_importance_sampling_clip_max: float | None = 1.5
        self.vllm_importance_sampling_clip_min: float | None = None
        self.state = SimpleNamespace(global_step=0)
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda values: values)
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}
        self.passes = 0
        self.noise = 0.0
        vars(self).update(fields)

    def generate(self, logps: Any) -> Any:
        return hooks.old_logps(self, self._get_per_token_logps_and_entropies)(logps)[0]


def _like_trls(name: str) -> Any:
    def score(self: Any, logps: Any) -> Any:
        self.passes += 1
        return logps + self.noise * torch.rand(()), None, None

    def nothing(self: Any) -> None: ...

    names = ("_prepare_inputs", "_generate_and_score_completions", "compute_loss", "_compute_loss")
    score.__module__ = nothing.__module__ = module = f"trl.trainer.{name}"
    methods = {"_get_per_token_logps_and_entropies": score, **dict.fromkeys(names, nothing)}
    return type(name, (Trainer,), {"__module__": module, **methods})


GRPOTrainer, RLOOTrainer = _like_trls("GRPOTrainer"), _like_trls("RLOOTrainer")


@pytest.fixture(autouse=True)
def no_trainer_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[describe.__module__], "_known", weakref.WeakKeyDictionary())


def checked(trainer: Any) -> Any:
    """Let the steps pass in which the pass runs twice."""
    for step in range(3):
        trainer.state.global_step = step
        assert trainer.generate(torch.zeros(1)) is not None
    trainer.state.global_step = 3
    return trainer


def batch(*, tools: bool = False, unscored: bool = False) -> dict[str, Any]:
    torch.manual_seed(1)
    lengths = torch.tensor([5, 3, 1, 4, 2, 5, 0, 3])
    sampling = -torch.rand(ROWS, TOKENS) * 3
    if unscored:
        sampling[0, 1] = torch.nan
    made = {
        "completion_mask": (torch.arange(TOKENS) < lengths[:, None]).long(),
        "sampling_per_token_logps": sampling,
        "new": -torch.rand(ROWS, TOKENS) * 3,
    }
    return {**made, "tool_mask": (torch.rand(ROWS, TOKENS) < 0.7).long()} if tools else made


def slices(whole: dict[str, Any]) -> list[dict[str, Any]]:
    order = torch.randperm(ROWS)
    return [{name: value[rows] for name, value in whole.items()} for rows in order.chunk(SLICES)]


def stock(trainer: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """TRL 1.16: the importance sampling ratio and the metrics of a batch."""
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    old, sampling = inputs["new"], inputs["sampling_per_token_logps"]
    difference = torch.nan_to_num((old - sampling) * mask, nan=0.0)
    sequences = trainer.vllm_importance_sampling_mode.startswith("sequence")
    ratio = torch.exp(difference.sum(-1, keepdim=True) if sequences else difference)
    low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    if trainer.vllm_importance_sampling_mode.endswith("truncate"):
        ratio = torch.clamp(ratio, min=low, max=high)
    else:
        low, high = (-torch.inf if low is None else low), (torch.inf if high is None else high)
        ratio = ratio.masked_fill((ratio < low) | (ratio > high), value=0.0)
    delta = torch.abs(old - sampling)
    delta = delta[mask.bool() & ~torch.isnan(delta)]
    flat = ratio.flatten() if sequences else ratio[mask.bool()]
    return ratio, {
        "sampling/sampling_logp_difference/mean": delta.mean().item(),
        "sampling/sampling_logp_difference/max": delta.max().item(),
        "sampling/importance_sampling_ratio/min": flat.min().item(),
        "sampling/importance_sampling_ratio/mean": flat.mean().item(),
        "sampling/importance_sampling_ratio/max": flat.max().item(),
    }


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize(("low", "high"), [(None, 1.5), (0.5, 1.5), (0.5, None)])
@pytest.mark.parametrize("inputs", [batch(), batch(tools=True), batch(unscored=True)], ids=["", "tools", "unscored"])
def test_ratio_and_metrics_are_those_of_the_whole_batch(mode: str, low: Any, high: Any, inputs: Any) -> None:
    trainer = checked(GRPOTrainer(vllm_importance_sampling_mode=mode))
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = low, high
    assert trainer.generate(torch.zeros(1)) is None
    expected, statistics = stock(trainer, inputs)
    for part in slices({**inputs, "expected": expected}):
        assert not trainer._metrics["train"]
        hooks.importance_sampling_ratio(trainer, part, part["new"].requires_grad_())
        assert torch.equal(part["importance_sampling_ratio"], part["expected"])
        assert not part["importance_sampling_ratio"].requires_grad
    found = trainer._metrics["train"]
    assert found.keys() == statistics.keys()
    for name, values in found.items():
        exact = not name.endswith("mean")
        assert values == ([statistics[name]] if exact else [pytest.approx(statistics[name], rel=1e-6)])


def test_below_1_6_the_bound_is_the_cap() -> None:
    trainer = checked(GRPOTrainer(vllm_importance_sampling_cap=1.2))
    for name in ("mode", "clip_min", "clip_max"):  # 0.23-0.25 know no mode either
        delattr(trainer, f"vllm_importance_sampling_{name}")
    trainer.generate(torch.zeros(1))
    inputs = batch()
    hooks.importance_sampling_ratio(trainer, inputs, inputs["new"])
    ratio = torch.exp((inputs["new"] - inputs["sampling_per_token_logps"]) * inputs["completion_mask"])
    assert torch.equal(inputs["importance_sampling_ratio"], ratio.clamp(max=1.2))


def test_autocast_does_not_reach_the_ratio() -> None:
    trainer = checked(GRPOTrainer())
    trainer.generate(torch.zeros(1))
    inputs = {name: v.bfloat16() if name != "completion_mask" else v for name, v in batch().items()}
    expected, _ = stock(trainer, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hooks.importance_sampling_ratio(trainer, inputs, inputs["new"])
    assert inputs["importance_sampling_ratio"].dtype == expected.dtype
    assert torch.equal(inputs["importance_sampling_ratio"], expected)


def test_a_second_iteration_has_its_ratio_and_is_not_logged_again() -> None:
    trainer = checked(GRPOTrainer(num_iterations=2, gas=2 * SLICES))
    trainer.generate(torch.zeros(1))
    parts = slices(batch())
    for part in (*parts, *parts):
        hooks.importance_sampling_ratio(trainer, part, part["new"])
    assert {len(values) for values in trainer._metrics["train"].values()} == {1}


def test_a_batch_that_was_not_used_up_is_logged_before_the_next() -> None:
    trainer = checked(GRPOTrainer())
    trainer.generate(torch.zeros(1))
    part = slices(batch())[0]
    hooks.importance_sampling_ratio(trainer, part, part["new"])
    assert not trainer._metrics["train"]
    trainer.generate(torch.zeros(1))
    assert {len(values) for values in trainer._metrics["train"].values()} == {1}


def test_a_batch_without_any_token_is_logged_as_zero() -> None:
    trainer = checked(GRPOTrainer())
    trainer.generate(torch.zeros(1))
    for part in slices({**batch(), "completion_mask": torch.zeros(ROWS, TOKENS, dtype=torch.long)}):
        hooks.importance_sampling_ratio(trainer, part, part["new"])
    assert {tuple(values) for values in trainer._metrics["train"].values()} == {(0.0,)}


def test_without_the_correction_nothing_is_added() -> None:
    trainer = checked(GRPOTrainer(vllm_importance_sampling_correction=False))
    trainer.generate(torch.zeros(1))
    inputs = batch()
    hooks.importance_sampling_ratio(trainer, inputs, inputs["new"])
    assert "importance_sampling_ratio" not in inputs


def test_the_pass_runs_twice_in_the_first_three_steps_and_then_no_more() -> None:
    trainer = GRPOTrainer()
    passes = []
    for step in (0, 0, 1, 2, 2, 3, 4):
        trainer.state.global_step = step
        before = trainer.passes
        trainer.generate(torch.zeros(1))
        passes.append(trainer.passes - before)
    assert passes == [2, 2, 2, 2, 2, 0, 0]


def test_a_random_model_is_found_out_and_keeps_its_random_numbers(caplog: pytest.LogCaptureFixture) -> None:
    trainer = GRPOTrainer(noise=1.0)
    torch.manual_seed(0)
    found = [trainer.generate(torch.zeros(1)) for _ in range(3)]
    torch.manual_seed(0)
    assert found == [torch.rand(()) for _ in range(3)]
    assert trainer.passes == 4
    (line,) = describe()
    assert line.startswith("GRPOTrainer: the pass runs, two passes over the same completions differ")
    assert [r.levelname for r in caplog.records if "two passes" in r.message] == ["WARNING"]


def test_status_says_how_far_the_training_forward_is_from_the_pass() -> None:
    trainer = GRPOTrainer()
    inputs = {**batch(), "old_per_token_logps": trainer.generate(batch()["new"])}
    assert describe() == ["GRPOTrainer: the pass runs, to be compared with the training forward"]
    elsewhere = torch.where(inputs["completion_mask"].bool(), inputs["new"], 7.0)
    hooks.importance_sampling_ratio(trainer, inputs, elsewhere)
    assert describe() == ["GRPOTrainer: 0 passes left out; the training forward equalled the pass in steps 0"]
    hooks.importance_sampling_ratio(trainer, inputs, inputs["new"] + 0.25)
    assert describe() == [
        "GRPOTrainer: 0 passes left out; the training forward differed from the pass by up to 2.5e-01 in steps 0"
    ]


def test_an_evaluation_runs_the_pass_and_leaves_the_batch_in_use_alone() -> None:
    trainer = checked(GRPOTrainer())
    trainer.generate(torch.zeros(1))
    first, second = slices(batch())
    hooks.importance_sampling_ratio(trainer, first, first["new"])
    trainer.model.eval()
    passes = trainer.passes
    assert trainer.generate(torch.zeros(1)) is not None
    assert trainer.passes == passes + 1
    hooks.importance_sampling_ratio(trainer, {"old_per_token_logps": torch.zeros(1)}, torch.ones(1))
    trainer.model.train()
    hooks.importance_sampling_ratio(trainer, second, second["new"])
    assert {len(values) for values in trainer._metrics["train"].values()} == {1}


def test_a_batch_from_before_an_update_is_refused() -> None:
    for trainer in (checked(GRPOTrainer()), checked(RLOOTrainer())):
        trainer.generate(torch.zeros(1))
        trainer.state.global_step += 1
        with pytest.raises(StaleOldLogps, match=r"generated in step 3.*this is step 4"):
            hooks.importance_sampling_ratio(trainer, batch(), torch.zeros(1))
        with pytest.raises(StaleOldLogps, match=r"generated in step 3.*this is step 4"):
            hooks.old_sequence_logps(trainer, {"old_logps": None}, torch.zeros(1))


def test_rloo_takes_the_old_sums_or_the_training_forwards() -> None:
    trainer = RLOOTrainer()
    old, new = torch.zeros(2), torch.ones(2, requires_grad=True)
    assert trainer.generate(old) is not None
    assert hooks.old_sequence_logps(trainer, {"old_logps": old}, new) is old
    assert "differed from the pass by up to 1.0e+00" in describe()[0]
    checked(trainer)
    assert trainer.generate(old) is None
    found = hooks.old_sequence_logps(trainer, {"old_logps": None}, new)
    assert torch.equal(found, new)
    assert not found.requires_grad


def test_sampling_logps_are_kept_only_where_the_pass_is_left_out() -> None:
    kept: dict[str, Any] = {}
    hooks.keep_sampling_logps(kept, torch.zeros(1), torch.ones(1))
    hooks.keep_sampling_logps(kept, None, None)
    assert kept == {}
    hooks.keep_sampling_logps(kept, None, torch.ones(1))
    assert kept == {"sampling_per_token_logps": torch.ones(1)}


def test_nothing_speaks_against_a_plain_trainer() -> None:
    assert reason_against(GRPOTrainer()) == ""
    assert reason_against(GRPOTrainer(lora_model(), beta=0.1)) == ""
    assert reason_against(RLOOTrainer()) == ""


@pytest.mark.parametrize(
    ("gas", "every", "iterations", "between"),
    [(2, 2, 1, False), (4, 2, 1, False), (4, 2, 2, False), (2, 2, 2, True), (2, 4, 1, True), (3, 2, 1, True)],
)
def test_an_update_between_generation_and_use(gas: int, every: int, iterations: int, between: bool) -> None:
    trainer = GRPOTrainer(num_iterations=iterations)
    trainer.args = SimpleNamespace(gradient_accumulation_steps=gas, steps_per_generation=every)
    assert ("weights are updated while a batch is in use" in reason_against(trainer)) == between


def _set_module_value(trainer: Any, name: str, value: Any) -> None:
    setattr(next(m for m in trainer.model.modules() if hasattr(m, "q_proj")), name, value)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda t: _set_module_value(t, "attention_dropout", 0.1), "self_attn.attention_dropout=0.1"),
        (lambda t: _set_module_value(t, "rank_dropout", {"default": 0.2}), "rank_dropout={'default': 0.2}"),
        (lambda t: t.model.add_module("extra", torch.nn.Dropout(0.1)), r"extra \(Dropout, p=0.1\)"),
        (lambda t: setattr(t.model.config, "attention_dropout", 0.1), "Qwen2Config.attention_dropout=0.1"),
        (lambda t: setattr(t.model.config, "router_jitter_noise", 0.01), "Qwen2Config.router_jitter_noise=0.01"),
        (lambda t: setattr(t.model.config, "text_config", _text_config()), "GPT2Config.*drop.*=0.1"),
        (lambda t: setattr(t.args, "neftune_noise_alpha", 5), "neftune_noise_alpha=5"),
    ],
)
def test_random_in_train_mode(prepare: Any, reason: str) -> None:
    trainer = GRPOTrainer()
    prepare(trainer)
    assert re.search(f"random in train mode: .*{reason}", reason_against(trainer))


def _text_config() -> Any:
    from transformers import GPT2Config

    return GPT2Config()


def test_dropout_that_is_off_is_no_reason() -> None:
    trainer = GRPOTrainer()
    trainer.model.add_module("none", torch.nn.Dropout(0.0))
    trainer.model.add_module("asleep", torch.nn.Dropout(0.5).eval())
    assert reason_against(trainer) == ""


def test_lora_dropout_is_found() -> None:
    assert "lora_dropout.default (Dropout, p=0.1)" in reason_against(GRPOTrainer(lora_model(lora_dropout=0.1)))


def test_overridden_methods() -> None:
    class Mine(GRPOTrainer):  # type: ignore[misc]
        def _compute_loss(self) -> None: ...

    class Named(GRPOTrainer):  # type: ignore[misc]
        def log(self) -> None: ...

    assert reason_against(Mine()) == "Mine overrides _compute_loss"
    assert reason_against(Named()) == ""
    replaced = GRPOTrainer()
    replaced.compute_loss = lambda: None
    assert reason_against(replaced) == "GRPOTrainer overrides compute_loss"
    assert "neither TRL's" in reason_against(SimpleNamespace(**vars(GRPOTrainer())))


def test_a_method_of_trls_class_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self: None)
    assert reason_against(GRPOTrainer()) == "GRPOTrainer._compute_loss is not TRL's own"


def test_what_needs_old_logps_before_the_loss() -> None:
    assert reason_against(RLOOTrainer(beta=0.05)).startswith("beta=0.05: RLOO subtracts the KL divergence")
    trainer = GRPOTrainer()
    trainer.args.use_liger_kernel = True
    assert reason_against(trainer) == ""  # from TRL 1.14 on a matter of the model's layers alone
    trainer.compute_liger_loss = lambda: None
    assert reason_against(trainer).startswith("use_liger_kernel: ")
