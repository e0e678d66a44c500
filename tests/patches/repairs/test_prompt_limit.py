from tests.helpers import check_drift, check_patched

BEFORE = """\
class RLOOTrainer:
    def _generate(self, prompts):
        if server:
            sampling_params = {
                "truncate_prompt_tokens": self.max_prompt_length,
            }
            outputs = self.vllm_client.chat(prompts, **sampling_params)
        generation_kwargs = {
            "n": 1,
            "truncate_prompt_tokens": self.max_prompt_length,
        }
        if conversational:
            outputs = self.llm.chat(prompts, sampling_params=sampling_params, use_tqdm=False)
        else:
            outputs = self.llm.generate(prompts, sampling_params=sampling_params, use_tqdm=False)
"""
LIMIT = "use_tqdm=False, **_trlpatch.prompt_limit(self.llm, self.max_prompt_length))"


def test_the_limit_is_offered_to_both_places_of_this_process():
    after = (
        BEFORE.replace(
            '            "n": 1,\n            "truncate_prompt_tokens": self.max_prompt_length,',
            '            "n": 1,\n            **_trlpatch.sampling_limit(self.max_prompt_length),',
        )
        .replace("        generation_kwargs =", "        # trlpatch: prompt_limit\n        generation_kwargs =")
        .replace("use_tqdm=False)", LIMIT)
        .replace(
            "            outputs = self.llm.",
            "            # trlpatch: prompt_limit\n            outputs = self.llm.",
        )
    )
    check_patched("prompt_limit", "rloo", "0.26.2", BEFORE, after)


def test_a_rollout_that_is_not_expected_is_drift():
    text = BEFORE + "        more = self.llm.generate(prompts)\n"
    check_drift("prompt_limit", "rloo", "0.26.2", text, "truncated_rollout: expected 2, found 3")


def test_a_call_on_several_lines_keeps_its_layout():
    before = BEFORE.partition("        if conversational")[0]
    after = before.replace(
        '"n": 1,\n            "truncate_prompt_tokens": self.max_prompt_length',
        '"n": 1,\n            **_trlpatch.sampling_limit(self.max_prompt_length)',
    ).replace("        generation_kwargs =", "        # trlpatch: prompt_limit\n        generation_kwargs =")
    check_patched(
        "prompt_limit",
        "rloo",
        "0.24.0",
        before + "        outputs = self.llm.generate(\n            prompts,  # text\n        )\n",
        after
        + "        # trlpatch: prompt_limit\n        outputs = self.llm.generate(\n            prompts,  # text\n"
        "            **_trlpatch.prompt_limit(self.llm, self.max_prompt_length),\n        )\n",
    )
