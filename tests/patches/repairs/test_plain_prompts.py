from tests.helpers import check_drift, check_patched

BEFORE = """\
class RLOOTrainer:
    def _generate_single_turn(self, prompts):
        prompts = [prepare_multimodal_messages_vllm(prompt) for prompt in prompts]

    def _compute(self, prompts):
        return [prepare_multimodal_messages(prompt, images) for prompt in prompts]
"""


def test_only_messages_are_prepared():
    after = BEFORE.replace(
        "        prompts = [prepare_multimodal_messages_vllm(",
        "        # trlpatch: plain_prompts\n"
        "        prompts = [_trlpatch.messages_only(prepare_multimodal_messages_vllm)(",
    )
    check_patched("plain_prompts", "rloo", "0.26.2", BEFORE, after)


def test_a_second_place_is_drift():
    text = BEFORE.replace("prepare_multimodal_messages(prompt, images)", "prepare_multimodal_messages_vllm(prompt)")
    check_drift("plain_prompts", "rloo", "0.26.2", text, "prepare_messages: expected 1, found 2")
