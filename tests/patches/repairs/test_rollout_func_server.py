from tests.helpers import check_drift, check_patched

BEFORE = """\
class GRPOTrainer:
    def __init__(self, model, args, rollout_func=None):
        self.rollout_func = rollout_func
"""


def test_the_function_is_checked_where_the_trainer_keeps_it():
    after = BEFORE.replace(
        "        self.rollout_func = rollout_func\n",
        "        # trlpatch: rollout_func_server\n"
        "        self.rollout_func = _trlpatch.rollout_func_server(self, model, args, rollout_func)\n",
    )
    check_patched("rollout_func_server", "grpo", "0.25.1", BEFORE, after)


def test_a_second_place_is_drift():
    text = BEFORE + "        self.rollout_func = rollout_func\n"
    check_drift("rollout_func_server", "grpo", "0.25.0", text, "rollout_func_stored: expected 1, found 2")
