import pytest

from tests.helpers import apply, check_drift, check_patched

BEFORE = """\
class GRPOTrainer:
    def __init__(self, model, args, rollout_func=None):
        if rollout_func is not None:
            warn("experimental")
        self.rollout_func = rollout_func

    def _generate(self, prompts):
        return self.rollout_func(prompts, self)
"""


@pytest.mark.parametrize("release", ["0.26.0", "0.28.0", "1.16.0"])
def test_the_function_is_wrapped_where_the_trainer_keeps_it(release: str):
    after = BEFORE.replace(
        "        self.rollout_func = rollout_func\n",
        "        # trlpatch: rollout_func\n        self.rollout_func = _trlpatch.rollout_func(self, rollout_func)\n",
    )
    check_patched("rollout_func", "grpo", release, BEFORE, after)


def test_what_is_wrapped_is_left_alone():
    once = apply("rollout_func", "grpo", "1.16.0", BEFORE).text
    assert apply("rollout_func", "grpo", "1.16.0", once).failed[0].reason.endswith("found 0")


def test_a_local_of_that_name_is_another_thing():
    text = BEFORE.replace("self.rollout_func = rollout_func", "run = self.rollout = rollout_func")
    check_drift(
        "rollout_func", "grpo", "1.16.0", text, "rollout_func_stored: expected 1, found 0", lookalike="rollout_func"
    )
