from tests.helpers import check_drift, check_patched

BEFORE = """\
class GOLDTrainer:
    def _generate_on_policy_outputs_vllm(self, generation_config):
        max_completion_length = generation_config.max_completion_length
"""


def test_the_length_is_read_off_the_field_that_there_is():
    after = BEFORE.replace(
        "        max_completion_length = generation_config.max_completion_length",
        "        # trlpatch: gold_length\n        max_completion_length = generation_config.max_new_tokens",
    )
    check_patched("gold_length", "gold", "0.25.1", BEFORE, after)


def test_another_field_is_drift():
    text = BEFORE.replace("generation_config.max_completion_length", "self.max_completion_length")
    reason = "completion_length: expected 1, found 0"
    line = "3: max_completion_length = self.max_completion_length"
    check_drift("gold_length", "gold", "0.25.1", text, reason, line)
