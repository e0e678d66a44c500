from tests.helpers import check_drift, check_patched

BEFORE = """\
class GRPOTrainer:
    def __init__(self, model):
        # suppress this warning
        model.warnings_issued["estimate_tokens"] = True
"""


def test_the_dictionary_is_asked_of_the_hook():
    after = BEFORE.replace(
        "        model.warnings_issued[",
        "        # trlpatch: warnings_issued\n        _trlpatch.warnings_issued(model)[",
    )
    check_patched("warnings_issued", "grpo", "0.27.1", BEFORE, after)


def test_a_guarded_write_is_drift_because_it_needs_no_repair():
    text = BEFORE.replace("model.warnings_issued[", 'getattr(model, "warnings_issued", {})[')
    check_drift("warnings_issued", "grpo", "0.27.1", text, "warnings_issued: expected 1, found 0", "getattr(model")
