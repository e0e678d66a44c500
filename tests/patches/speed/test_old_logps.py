from tests.helpers import check_drift, check_patched

GRPO = """\
class GRPOTrainer:
    def __init__(self, args):
        self.vllm_importance_sampling_correction = args.vllm_importance_sampling_correction

    def _generate_and_score_completions(self, inputs):
        with torch.no_grad():
            if self.args.gradient_accumulation_steps % generate_every != 0 or (
                self.use_vllm and self.vllm_importance_sampling_correction
            ):
                old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(
                    self.model,
                    batch_size=batch_size,
                    **forward_kwargs,  # may contain pixel_values
                )
            else:
                old_per_token_logps = None

            # Compute the importance sampling ratio
            if self.use_vllm and self.vllm_importance_sampling_correction:
                difference = old_per_token_logps - sampling_per_token_logps
            ref_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(self.ref_model)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            delta = torch.abs(difference)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            output["importance_sampling_ratio"] = vllm_importance_sampling_ratio
        return output

    def _compute_loss(self, model, inputs):
        per_token_logps, entropies = self._get_per_token_logps_and_entropies(model)
        old_per_token_logps = inputs.get("old_per_token_logps")
        old_per_token_logps = per_token_logps.detach() if old_per_token_logps is None else old_per_token_logps
        if self.use_vllm and self.vllm_importance_sampling_correction:
            per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]
"""

GRPO_PATCHED = """\
class GRPOTrainer:
    def __init__(self, args):
        self.vllm_importance_sampling_correction = args.vllm_importance_sampling_correction

    def _generate_and_score_completions(self, inputs):
        with torch.no_grad():
            # trlpatch: old_logps
            if self.args.gradient_accumulation_steps % generate_every != 0 or (
                self.use_vllm and self.vllm_importance_sampling_correction
            ):
                old_per_token_logps, _, _ = _trlpatch.old_logps(self, self._get_per_token_logps_and_entropies)(
                    self.model,
                    batch_size=batch_size,
                    **forward_kwargs,  # may contain pixel_values
                )
            else:
                old_per_token_logps = None

            # Compute the importance sampling ratio
            # trlpatch: old_logps
            if self.use_vllm and self.vllm_importance_sampling_correction and old_per_token_logps is not None:
                difference = old_per_token_logps - sampling_per_token_logps
            ref_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(self.ref_model)
        # trlpatch: old_logps
        if self.use_vllm and self.vllm_importance_sampling_correction and old_per_token_logps is not None:
            delta = torch.abs(difference)
        # trlpatch: old_logps
        if self.use_vllm and self.vllm_importance_sampling_correction and old_per_token_logps is not None:
            output["importance_sampling_ratio"] = vllm_importance_sampling_ratio
        return output

    def _compute_loss(self, model, inputs):
        per_token_logps, entropies = self._get_per_token_logps_and_entropies(model)
        old_per_token_logps = inputs.get("old_per_token_logps")
        old_per_token_logps = per_token_logps.detach() if old_per_token_logps is None else old_per_token_logps
        # trlpatch: old_logps
        _trlpatch.importance_sampling_ratio(self, inputs, per_token_logps)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]
"""

RLOO = """\
class RLOOTrainer:
    def _generate_and_score_completions(self, inputs):
        old_per_token_logps, _ = self._get_per_token_logps_and_entropies(self.model)
        old_logps = (old_per_token_logps * completion_mask).sum(1)  # mask out padding

    def _compute_loss(self, model, inputs):
        logps = (per_token_logps * completion_mask).sum(1)
        old_logps = inputs["old_logps"]
        log_ratio = logps - old_logps
        self.again = old_logps
"""

RLOO_PATCHED = """\
class RLOOTrainer:
    def _generate_and_score_completions(self, inputs):
        # trlpatch: old_logps
        old_per_token_logps, _ = _trlpatch.old_logps(self, self._get_per_token_logps_and_entropies)(self.model)
        # trlpatch: old_logps
        old_logps = None if old_per_token_logps is None else (old_per_token_logps * completion_mask).sum(1)  # mask out padding

    def _compute_loss(self, model, inputs):
        logps = (per_token_logps * completion_mask).sum(1)
        # trlpatch: old_logps
        old_logps = _trlpatch.old_sequence_logps(self, inputs, logps)
        log_ratio = logps - old_logps
        self.again = old_logps
"""  # noqa: E501  # as long as TRL's comment behind it makes it


def test_the_pass_and_what_needs_it_at_generation_go_through_the_hooks():
    check_patched("old_logps", "grpo", "1.16.0", GRPO, GRPO_PATCHED)


def test_below_0_27_1_the_batch_gets_the_sampling_logps_too():
    put = '            output["importance_sampling_ratio"] = vllm_importance_sampling_ratio\n'
    kept = (
        f"{put}        # trlpatch: old_logps\n"
        "        _trlpatch.keep_sampling_logps(output, old_per_token_logps, sampling_per_token_logps)\n"
    )
    check_patched("old_logps", "grpo", "0.27.0", GRPO, GRPO_PATCHED.replace(put, kept))


def test_rloo_has_sums_over_sequences():
    check_patched("old_logps", "rloo", "0.22.0", RLOO, RLOO_PATCHED)
    check_patched("old_logps", "rloo", "1.16.0", RLOO, RLOO_PATCHED)


def test_a_use_of_the_correction_that_is_not_known_is_drift():
    fourth = "        if self.use_vllm and self.vllm_importance_sampling_correction:\n            log(difference)\n"
    text = GRPO.replace("        return output\n", f"{fourth}        return output\n")
    reason = "correction_at_generation: expected 3, found 4"
    check_drift("old_logps", "grpo", "1.16.0", text, reason, "vllm_importance_sampling_correction")


def test_another_fallback_in_the_loss_is_drift():
    text = GRPO.replace("per_token_logps.detach() if", "per_token_logps.clone() if")
    check_drift("old_logps", "grpo", "1.16.0", text, "old_logps_in_loss: expected 1, found 0")


def test_another_sum_is_drift():
    text = RLOO.replace(").sum(1)  # mask", ").mean(1)  # mask")
    check_drift("old_logps", "rloo", "1.16.0", text, "old_logps_summed: expected 1, found 0", "old_logps = ")
