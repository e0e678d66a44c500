"""What trainers can do, on an attached engine, with the TRL release that can be imported.

Every rollout of every scenario (tests/cpu/features.py) must come from the adapter as it is at that moment: the
engine's log-probabilities of what it sampled are compared with the training model's.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from tests.cpu.features import ALGORITHMS, SCENARIOS
from tests.cpu.scenarios import TOLERANCE, report_of
from trlpatch.source.locate import find_trl

pytestmark = [pytest.mark.cpu, pytest.mark.release]

Rollouts = list[dict[str, Any]]

CHATS = {"grpo": ((0, 25), (0, 29, 1)), "rloo": ((0, 25), (0, 29, 1)), "online_dpo": ((0, 18), (0, 23))}
"""From which release, and until which, the engine itself applies the chat template to messages."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All scenarios of all algorithms, on one engine in one process."""
    return report_of("tests.cpu.features", [], [], tmp_path_factory.mktemp("features") / "report.json")


@pytest.fixture
def found(report: dict[str, Any], algorithm: str, scenario: str) -> dict[str, Any]:
    name, first = ALGORITHMS[algorithm]
    if find_trl().release < first:
        pytest.skip(f"{name} rolls out on vLLM from TRL {'.'.join(map(str, first))} on")
    result: dict[str, Any] = report["found"][algorithm][scenario]
    assert "error" not in result, result.get("error")
    return result


def of(scenario: str, *only: str) -> pytest.MarkDecorator:
    """A test of what `scenario` found, for the algorithms that have it, or only for some of them."""
    having = [(name, scenario) for name in only or ALGORITHMS if scenario in SCENARIOS[name]]
    return pytest.mark.parametrize(("algorithm", "scenario"), having, ids=[name for name, _ in having])


def assert_live(rollouts: Rollouts, steps: list[int]) -> None:
    """One rollout at each of the `steps`, each from the adapter of that step."""
    assert [rollout["step"] for rollout in rollouts] == steps
    assert max(rollout["gap"] for rollout in rollouts) < TOLERANCE
    versions = [rollout["adapter"] for rollout in rollouts]
    assert None not in versions
    assert len(set(versions)) >= len(set(steps)), "a version that is handed over has a name of its own"


def counts_twice(algorithm: str) -> bool:
    """RLOO of TRL 0.26 counts each micro-step in `training_step` and in `_prepare_inputs`: twice the rollouts."""
    return algorithm == "rloo" and (0, 26) <= find_trl().release < (0, 27)


def test_one_engine_serves_all_trainers(report: dict[str, Any]) -> None:
    assert report["engines_built"] == 0, "the attached one was built before"
    assert report["launched"] == ["DistributedType.NO"], "a later trainer must not be taken for a launcher's rank"
    assert len(report["patched"]) == len(report["found"])
    assert all("trlpatch" in file for file in report["patched"])


@of("without_requests")
def test_a_rollout_without_its_adapter_is_noticed_from_the_first_step_on(found: dict[str, Any]) -> None:
    assert [rollout["adapter"] for rollout in found["rollouts"]] == [None] * 3
    assert min(rollout["gap"] for rollout in found["rollouts"]) > 100 * TOLERANCE


@of("plain")
def test_each_step_rolls_out_with_the_adapter_of_that_step(found: dict[str, Any]) -> None:
    assert_live(found["rollouts"], [0, 1, 2])
    assert found["moved"]


@of("conversational")
def test_messages_become_prompts_by_the_chat_template(found: dict[str, Any], algorithm: str) -> None:
    assert_live(found["rollouts"], [0, 1, 2])
    assert [prompt for prompt in found["prompts"] if prompt not in found["rendered"]] == []
    assert len(found["prompts"]) > 3
    first, end = CHATS[algorithm]
    kind = "chat" if first <= find_trl().release < end else "generate"
    assert [rollout["kind"] for rollout in found["rollouts"]] == [kind] * 3


@of("evaluation")
def test_evaluations_roll_out_with_the_adapter_of_that_moment(found: dict[str, Any]) -> None:
    during = [rollout for rollout in found["rollouts"] if rollout["mode"] == "eval"]
    training = [rollout for rollout in found["rollouts"] if rollout["mode"] == "train"]
    assert_live(training, [0, 1, 2])
    assert_live(during, [1, 1, 2, 2, 3, 3])
    assert found["eval_rewards"] == 5


@of("evaluation")
def test_an_evaluation_after_training_sees_what_changed_without_a_step(found: dict[str, Any]) -> None:
    assert found["best_loaded"], "the adapter of the first step, loaded when training ended"
    assert_live(found["later"], [3, 3, 3, 3])
    last = found["rollouts"][-1]["adapter"]
    best, also_best, by_hand, _ = (rollout["adapter"] for rollout in found["later"])
    assert best == also_best
    assert len({last, best, by_hand}) == 3


@of("accumulation", "grpo", "rloo")
def test_micro_steps_share_a_rollout_a_step_has_two_and_a_rollout_serves_two_steps(
    found: dict[str, Any], algorithm: str
) -> None:
    twice = counts_twice(algorithm)
    assert_live(found["one"]["rollouts"], [0, 0, 1, 1, 2, 2] if twice else [0, 1, 2])
    assert_live(found["two"]["rollouts"], [0, 0, 0, 0, 1, 1, 1, 1] if twice else [0, 0, 1, 1])
    assert_live(found["longer"]["rollouts"], [0, 1, 2, 3] if twice else [0, 2])
    assert all(found[name]["moved"] for name in ("one", "two", "longer"))


@of("accumulation", "online_dpo")
def test_each_micro_step_has_a_rollout(found: dict[str, Any]) -> None:
    assert_live(found["each"]["rollouts"], [0, 0, 1, 1])


@of("iterations")
def test_a_rollout_serves_several_iterations(found: dict[str, Any], algorithm: str) -> None:
    assert_live(found["rollouts"], [0, 1, 2, 3] if counts_twice(algorithm) else [0, 2])
    assert found["moved"]


@of("resumed")
def test_the_first_rollout_after_resuming_uses_the_restored_adapter(found: dict[str, Any]) -> None:
    assert_live(found["before"]["rollouts"], [0, 1])
    assert_live(found["after"]["rollouts"], [2, 3])
    assert {"checkpoint-2", "checkpoint-4"} <= set(found["saved"])
    if len(found["adapters"]) > 1 and version("transformers").startswith("4."):
        pytest.skip("transformers 4 does not restore the trained adapter beside another, here TRL's reference")
    assert found["restored"], "at the start of training the adapter was the first trainer's last"


@of("checkpointing")
def test_activations_are_computed_again_and_the_adapter_learns(found: dict[str, Any]) -> None:
    assert found["computed_again"] == 3
    assert found["moved"]
    assert_live(found["rollouts"], [0, 1, 2])


@of("reference")
def test_a_reference_adapter_leaves_rollouts_to_the_trained_one(found: dict[str, Any]) -> None:
    assert_live(found["rollouts"], [0, 1, 2])
    assert found["kl"][-1] > 0
    assert "default" in found["adapters"]


@of("no_processing_class")
def test_the_tokenizer_is_loaded_when_none_is_given(found: dict[str, Any]) -> None:
    assert_live(found["rollouts"], [0, 1])
    assert "Tokenizer" in found["loaded"]
    assert [prompt for prompt in found["prompts"] if prompt not in found["asked"]] == []
    assert len(found["prompts"]) > 3


@of("peft_config")
def test_an_adapter_that_the_trainer_makes_is_handed_over(found: dict[str, Any]) -> None:
    assert found["model"] == "PeftModelForCausalLM"
    assert_live(found["rollouts"], [0, 1, 2])
    assert found["moved"]


@of("merged")
def test_an_adapter_merged_into_the_base_weights_is_not_forgotten(found: dict[str, Any]) -> None:
    assert found["refused"] is not None, "rollouts would have come from the base model without it"
    assert "is not the one that the engine was attached with" in found["refused"]
