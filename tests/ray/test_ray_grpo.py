"""Stock GRPO on two engines on Ray actors: real Ray, real vLLM on a CPU, with the TRL release that can be imported.

One process, one cluster and two engines for all cases (tests/ray/grpo_runs.py).
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.cpu.scenarios import TOLERANCE, report_of
from trlpatch.source.locate import find_trl
from trlpatch.source.releases import NEWEST_TESTED

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        find_trl().release != NEWEST_TESTED and not os.environ.get("TRLPATCH_TEST_RAY"),
        reason="starts a cluster and several engines: with the newest pinned release, with TRLPATCH_TEST_RAY=1 any",
    ),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("ray")
    return report_of("tests.ray.grpo_runs", [], [], tmp_path_factory.mktemp("ray") / "report.json")


def test_a_stock_trainer_rolls_out_on_the_actors(report: dict[str, Any]) -> None:
    grpo = report["grpo"]
    assert grpo["uses_them"]
    assert grpo["mode"] == [True, "colocate"]
    assert grpo["engines"] == [0, 1]


def test_each_step_rolls_out_with_the_adapter_of_that_step(report: dict[str, Any]) -> None:
    rollouts = report["grpo"]["rollouts"]
    assert [rollout["step"] for rollout in rollouts] == [0, 1, 2]
    assert len({rollout["adapter"] for rollout in rollouts} - {None}) == 3
    assert max(rollout["gap"] for rollout in rollouts) < TOLERANCE
    assert len(report["grpo"]["witness"]) == (3 if find_trl().release >= (0, 23) else 0)
    assert max(report["grpo"]["witness"], default=0) < TOLERANCE


def test_the_adapter_is_sent_when_it_has_moved_and_not_twice(report: dict[str, Any]) -> None:
    assert report["grpo"]["sent"] == 3


def test_without_the_request_the_log_probabilities_speak(report: dict[str, Any]) -> None:
    first, *moved = report["grpo"]["control"]
    assert first["gap"] < TOLERANCE, "lora_B is zero before the first update: the base model is the policy"
    assert min(rollout["gap"] for rollout in moved) > 20 * TOLERANCE


def test_answers_are_those_of_the_prompts_in_order_whoever_gave_them(report: dict[str, Any]) -> None:
    surface = report["surface"]
    assert surface["engines"] == [0, 1]
    assert surface["in_order"]
    assert surface["completions"] == [2] * surface["prompts"]
    assert surface["greedy_as_one_engine"]
    assert surface["texts_as_ids"]
    assert surface["chat_as_rendered"]
    assert surface["progress"] == surface["prompts"]


def test_each_engine_samples_with_a_seed_of_its_own(report: dict[str, Any]) -> None:
    assert report["surface"]["seeds"] == [0, 1]
    assert report["surface"]["sampled_alike"] is False
    assert report["surface"]["seeded_alike"]


def test_the_engines_are_shown(report: dict[str, Any]) -> None:
    assert "2 Ray actors on " in report["surface"]["status"]
    assert "sent to Ray actors (version " in report["surface"]["status"]


def test_what_an_engine_says_of_itself_is_small(report: dict[str, Any]) -> None:
    assert max(report["surface"]["info_bytes"]) < 2**20, "configuration, without layers and KV cache"


def test_another_model_is_not_attached(report: dict[str, Any]) -> None:
    assert "they differ by" in report["surface"]["other_model"]


def test_requests_by_hand_and_an_interrupt_leave_nothing_behind(report: dict[str, Any]) -> None:
    hands = report["hands"]
    assert hands["by_hand"] == ["x", "y"]
    assert hands["bare_gap"] < TOLERANCE
    assert hands["interrupted"] == "KeyboardInterrupt"
    assert hands["left"] == 0
    counted, answered = hands["tokens_after"]
    assert counted == answered, "nothing of the interrupted call was answered later"
    assert hands["gap_after"] < TOLERANCE


def test_a_version_that_the_engines_do_not_hold_is_refused(report: dict[str, Any]) -> None:
    assert "asked for adapter 99" in report["hands"]["wrong_version"]
    assert "a version of the live adapter that the engine" in report["hands"]["stale_request"]


def test_other_trainers_and_conversations_roll_out_on_the_actors(report: dict[str, Any]) -> None:
    found = report["features"]
    assert found, "a scenario of this release"
    for name, one in found.items():
        assert "error" not in one, f"{name}: {one['error']}"
        assert one["moved"], name
        assert len({rollout["adapter"] for rollout in one["rollouts"]} - {None}) == len(one["rollouts"]), name
        assert max(rollout["gap"] for rollout in one["rollouts"]) < TOLERANCE, name


def test_one_argument_loads_a_model_with_engines_elsewhere(report: dict[str, Any]) -> None:
    loaded = report["loaded"]
    assert loaded["location"].startswith("1 Ray actor on ")
    assert loaded["utilization"] == 0.9
    assert len({rollout["adapter"] for rollout in loaded["rollouts"]} - {None}) == 3
    assert max(rollout["gap"] for rollout in loaded["rollouts"]) < TOLERANCE


def test_what_is_wrong_with_a_prompt_is_vllms_own_error(report: dict[str, Any]) -> None:
    name, text = report["hands"]["too_long"]
    assert not name.startswith("RayTaskError")
    assert "256" in text
    assert "Traceback" not in text


def test_an_engine_that_is_killed_is_replaced_and_no_prompt_is_lost(report: dict[str, Any]) -> None:
    lost = report["lost_engine"]
    assert lost["faults"] == ["killed"]
    assert lost["answers"] == [lost["prompts"]] * 2
    assert lost["in_order"]
    assert lost["gap"] < TOLERANCE


def test_the_engine_in_its_place_has_the_adapter_before_it_serves(report: dict[str, Any]) -> None:
    lost = report["lost_engine"]
    assert lost["others"] == [False, True]
    assert lost["versions"] == [0, 0]
    assert lost["gap_after"] < TOLERANCE


def test_errors_of_actors_arrive_and_say_whether_the_process_is_lost(report: dict[str, Any]) -> None:
    errors = report["toy_faults"]["errors"]
    assert {name: error[:2] for name, error in errors.items()} == {
        "odd exception": ["request", "EngineRaised"],
        "memory": ["out of memory", "MemoryError"],
        "value": ["request", "ValueError"],
        "interrupt": ["failed", "TaskCancelledError"],
        "exit": ["killed", "ActorDiedError"],
    }
    assert errors["odd exception"][2].startswith("OddSignature, which cannot be pickled: 3: odd")
    assert errors["value"][2] == "of the prompt"


def test_processes_that_end_or_stop_cost_no_answer(report: dict[str, Any]) -> None:
    toy = report["toy_faults"]
    assert [toy[name] for name in ("after_exit", "killed", "stopped", "after_interrupt")] == [True] * 4
    assert toy["faults"][:2] == ["killed", "killed"]
    assert set(toy["faults"][2:]) == {"hung"}
    assert (toy["interrupted"], toy["left_in_flight"], toy["degraded"]) == ("KeyboardInterrupt", 0, "")


def test_no_actor_outlives_its_driver(report: dict[str, Any]) -> None:
    assert report["killed_driver"]["before"] == [True, True]
    assert report["killed_driver"]["after"] == [False, False]


def test_a_policy_whose_every_weight_is_trained_is_sent_to_every_engine(report: dict[str, Any]) -> None:
    full = report["full_weights"]
    if "refused" in full:
        assert "loaders of vLLM below 0.25 do not know layers that LoRA has wrapped" in full["refused"]
        assert full["version"] == ["0", "0"]
        return
    assert full["version"] == ["0", "2"]
    assert full["versions"] == ["2", "2"]
    assert full["trained"]["adapters"] == [None, None]
    assert max(full["trained"]["gaps"]) < TOLERANCE
    assert min(full["control"]["gaps"]) > 20 * TOLERANCE, "nothing was sent: the engines had other weights"
    assert "weights sent to 2 engines (version 2, " in full["status"]


def test_weights_are_sent_while_the_trainer_does_something_else(report: dict[str, Any]) -> None:
    if "refused" not in report["full_weights"]:
        assert report["full_weights"]["started"]
        assert report["full_weights"]["ended"] is None
