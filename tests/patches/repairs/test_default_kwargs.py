from tests.helpers import check_drift, check_patched

BEFORE = """\
class GRPOTrainer:
    def _generate(self):
        generation_kwargs.update(self.args.generation_kwargs)
"""


def test_the_option_goes_through_the_hook():
    after = BEFORE.replace(
        "        generation_kwargs.update(self.args.generation_kwargs)",
        "        # trlpatch: default_kwargs\n"
        "        generation_kwargs.update(_trlpatch.given(self.args.generation_kwargs))",
    )
    check_patched("default_kwargs", "grpo", "0.19.0", BEFORE, after)


def test_another_option_is_drift():
    text = BEFORE.replace("self.args.generation_kwargs)", "self.args.other)")
    reason = "kwargs_update: expected 1, found 0"
    check_drift("default_kwargs", "grpo", "0.19.0", text, reason, "3: generation_kwargs.update(self.args.other)")
