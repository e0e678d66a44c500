from tests.helpers import check_drift, check_patched

BEFORE = """\
class OnlineDPOTrainer:
    def training_step(self, loss):
        if self.use_apex:
            amp(loss)

    def _maybe_log_save_evaluate(self, tr_loss):
        tr_loss_scalar = self._nested_gather(tr_loss).mean().item()
"""


def test_both_parts_are_asked_of_the_hooks():
    after = BEFORE.replace(
        "        if self.use_apex:", "        # trlpatch: trainer_parts\n        if _trlpatch.use_apex(self):"
    ).replace(
        "        tr_loss_scalar = self._nested_gather(tr_loss)",
        "        # trlpatch: trainer_parts\n        tr_loss_scalar = _trlpatch.nested_gather(self)(tr_loss)",
    )
    check_patched("trainer_parts", "online_dpo", "0.23.1", BEFORE, after)


def test_a_third_place_is_drift():
    text = BEFORE.replace("amp(loss)", "amp(self._nested_gather(loss))")
    reason = "nested_gather: expected 1, found 2"
    check_drift("trainer_parts", "online_dpo", "0.23.1", text, reason)
