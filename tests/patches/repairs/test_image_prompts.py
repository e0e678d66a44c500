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
        "            all_outputs = self.llm.generate(vllm_prompts,",
        "            # trlpatch: image_prompts\n"
        "            all_outputs = self.llm.generate(_trlpatch.image_prompts(self, vllm_prompts),",
    ).replace(
        "        all_prompt_ids = [output.prompt_token_ids for output in all_outputs]",
        "        # trlpatch: image_prompts\n"
        "        all_prompt_ids = [output.prompt_token_ids for output in "
        "_trlpatch.same_prompts(self, vllm_prompts, all_outputs)]",
    )
    check_patched("image_prompts", "vllm_generation", "1.16.0", BEFORE, after)


def test_prompts_that_nobody_compares_are_drift():
    text = BEFORE.replace("[output.prompt_token_ids for", "[one.prompt_token_ids for").replace(
        "for output in all", "for one in all", 1
    )
    reason = "prompts_read: expected 1, found 0"
    check_drift("image_prompts", "vllm_generation", "1.16.0", text, reason, "prompt_token_ids")
