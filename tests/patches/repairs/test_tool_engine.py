from tests.helpers import check_drift, check_patched

BEFORE = """\
class GRPOTrainer:
    def _tool_call_loop(self):
        max_model_len = self.llm.llm_engine.model_config.max_model_len
"""


def test_the_engine_is_asked_where_it_is():
    after = BEFORE.replace(
        "        max_model_len = self.llm.",
        "        # trlpatch: tool_engine\n        max_model_len = self.vllm_generation.llm.",
    )
    check_patched("tool_engine", "grpo", "0.29.0", BEFORE, after)


def test_an_engine_that_is_asked_there_already_is_drift():
    text = BEFORE.replace("self.llm", "self.vllm_generation.llm")
    reason = "context_length: expected 1, found 0"
    line = "3: max_model_len = self.vllm_generation.llm.llm_engine.model_config.max_model_len"
    check_drift("tool_engine", "grpo", "0.29.0", text, reason, line)
