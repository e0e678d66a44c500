from tests.helpers import check_drift, check_patched

BEFORE = """\
class VLLMGeneration:
    def generate(self, prompts, images):
        with profiler:
            all_outputs = self.llm.generate(vllm_prompts, sampling_params=sampling_params, use_tqdm=False)

        all_prompt_ids = [output.prompt_token_ids for output in all_outputs]
        all_completion_ids = [output.token_ids for outputs in all_outputs for output in outputs.outputs]
"""


def test_prompts_are_given_and_read_as_they_are_trained_on():
    after = BEFORE.replace(
        "            all_outputs = self.llm.generate(vllm_prompts, sampling_params=sampling_params, use_tqdm=False)",
        "            # trlpatch: image_prompts\n"
        "            all_outputs = _trlpatch.same_prompts(self, self.llm.generate(_trlpatch.image_prompts(self, "
        "vllm_prompts), sampling_params=sampling_params, use_tqdm=False))",
    )
    check_patched("image_prompts", "vllm_generation", "1.16.0", BEFORE, after)


def test_prompts_that_cannot_be_seen_are_drift():
    text = BEFORE.replace("generate(vllm_prompts, ", "generate(*everything, ")
    reason = "image_rollout: expected 1, found 0"
    check_drift("image_prompts", "vllm_generation", "1.16.0", text, reason, "generate")
