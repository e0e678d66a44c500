from tests.helpers import check_drift, check_patched

GRPO = """\
class GRPOTrainer:
    def _get_per_token_logps_and_entropies(self, model, input_ids, logits_to_keep, compute_entropy=False):
        for start in range(0, input_ids.size(0), batch_size):
            # Only add logits_to_keep if the model supports it
            logits = model(**model_inputs).logits
            # Exclude the last value
            logits = logits[:, :-1, :]
            logits = logits / self.temperature
            logps = selective_log_softmax(logits, completion_ids)  # compute logprobs
            if compute_entropy:
                with torch.no_grad():
                    entropies = entropy_from_logits(logits)

    def _other(self, model):
        logits = model(**model_inputs).logits
        return selective_log_softmax(logits, completion_ids)
"""

GRPO_PATCHED = """\
class GRPOTrainer:
    def _get_per_token_logps_and_entropies(self, model, input_ids, logits_to_keep, compute_entropy=False):
        for start in range(0, input_ids.size(0), batch_size):
            # Only add logits_to_keep if the model supports it
            # trlpatch: logps
            logits = _trlpatch.deferred_logits(self, model)(**model_inputs).logits
            # Exclude the last value
            logits = logits[:, :-1, :]
            logits = logits / self.temperature
            # trlpatch: logps
            logps = _trlpatch.selective_log_softmax(selective_log_softmax, entropy_from_logits, compute_entropy)(logits, completion_ids)  # compute logprobs
            if compute_entropy:
                with torch.no_grad():
                    # trlpatch: logps
                    entropies = _trlpatch.entropy_from_logits(entropy_from_logits)(logits)

    def _other(self, model):
        logits = model(**model_inputs).logits
        return selective_log_softmax(logits, completion_ids)
"""  # noqa: E501  # as long as TRL's comment behind it makes it

OLDEST = """\
class GRPOTrainer:
    def _get_per_token_logps(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None):
        logits = model(
            input_ids=input_ids_batch, logits_to_keep=logits_to_keep + 1
        ).logits
        logits = logits / self.temperature
        logps = selective_log_softmax(logits, input_ids_batch)
"""

OLDEST_PATCHED = """\
class GRPOTrainer:
    def _get_per_token_logps(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None):
        # trlpatch: logps
        logits = _trlpatch.deferred_logits(self, model)(
            input_ids=input_ids_batch, logits_to_keep=logits_to_keep + 1
        ).logits
        logits = logits / self.temperature
        # trlpatch: logps
        logps = _trlpatch.selective_log_softmax(selective_log_softmax)(logits, input_ids_batch)
"""

TOGETHER = """\
class RLOOTrainer:
    def _get_per_token_logps_and_entropies(self, model, input_ids, compute_entropy=False):
        outputs = model(**model_inputs)
        if compute_entropy:
            logps, entropies = selective_log_softmax_and_entropy(
                logits,
                completion_ids,
                entropy_requires_grad=False,
                temperature=self.temperature,
            )
        else:
            logps = selective_log_softmax(
                logits, completion_ids, temperature=self.temperature, row_mask=completion_mask
            )
"""

TOGETHER_PATCHED = """\
class RLOOTrainer:
    def _get_per_token_logps_and_entropies(self, model, input_ids, compute_entropy=False):
        # trlpatch: logps
        outputs = _trlpatch.deferred_logits(self, model)(**model_inputs)
        if compute_entropy:
            # trlpatch: logps
            logps, entropies = _trlpatch.selective_log_softmax_and_entropy(selective_log_softmax_and_entropy)(
                logits,
                completion_ids,
                entropy_requires_grad=False,
                temperature=self.temperature,
            )
        else:
            # trlpatch: logps
            logps = _trlpatch.selective_log_softmax(selective_log_softmax)(
                logits, completion_ids, temperature=self.temperature, row_mask=completion_mask
            )
"""


def test_callees_are_replaced_in_the_function_for_logps_alone():
    check_patched("logps", "grpo", "0.29.1", GRPO, GRPO_PATCHED)
    check_patched("logps", "rloo", "1.13.0", *(text.replace("GRPO", "RLOO") for text in (GRPO, GRPO_PATCHED)))


def test_below_0_20_there_are_no_entropies():
    check_patched("logps", "grpo", "0.18.0", OLDEST, OLDEST_PATCHED)


def test_1_14_computes_both_in_one_call():
    check_patched("logps", "rloo", "1.14.2", TOGETHER, TOGETHER_PATCHED)


def test_another_forward_pass_is_drift():
    text = GRPO.replace("logits = model(**model_inputs)", "logits = self.model(**model_inputs)", 1)
    check_drift("logps", "grpo", "0.29.1", text, "forward_for_logits: expected 1, found 0", "model(**model_inputs)")


def test_entropies_without_log_probabilities_are_drift():
    text = GRPO.replace("logps = selective_log_softmax", "logps = fused_log_softmax")
    check_drift("logps", "grpo", "0.29.1", text, "log_softmax_of_logits: expected 1, found 0")


def test_a_second_use_of_the_entropy_is_drift():
    text = GRPO.replace("    def _other", "                self.log(entropy_from_logits(logits))\n\n    def _other")
    check_drift("logps", "grpo", "0.29.1", text, "entropy_of_logits: expected 1, found 2", "entropy_from_logits")
