from tests.helpers import check_drift, check_patched


def test_level_tags_and_reload_go_through_the_hooks():
    before = """\
class VLLMGeneration:
    def _init_vllm(self):
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)

    def sync_weights(self):
        self.llm.wake_up(tags=["weights"])

    def generate(self, prompts):
        self.llm.wake_up(tags=["weights"])
        try:
            self.llm.collective_rpc("reload_weights")
        except NotImplementedError:
            pass
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.sleep(level=2)
"""
    after = """\
class VLLMGeneration:
    def _init_vllm(self):
        if self.enable_sleep_mode:
            # trlpatch: sleep
            _trlpatch.sleep(self, self.llm, level=2)

    def sync_weights(self):
        # trlpatch: sleep
        _trlpatch.wake_up(self, self.llm, tags=["weights"])

    def generate(self, prompts):
        # trlpatch: sleep
        _trlpatch.wake_up(self, self.llm, tags=["weights"])
        try:
            # trlpatch: sleep
            _trlpatch.reload_weights(self, self.llm)
        except NotImplementedError:
            pass
        # trlpatch: sleep
        _trlpatch.wake_up(self, self.llm, tags=["kv_cache"])
        # trlpatch: sleep
        _trlpatch.sleep(self, self.llm, level=2)
"""
    check_patched("sleep", "vllm_generation", "1.9.2", before, after)


def test_a_trainer_without_sleep_code_sleeps_after_its_rollout():
    before = """\
class RLOOTrainer:
    def _generate_and_score_completions(self, inputs):
        with profiling_context(self, "vLLM.generate"):
            all_outputs = self.llm.generate(prompts)
        completion_ids = [o.token_ids for o in all_outputs]
"""
    after = before.replace(
        "(prompts)\n",
        "(prompts)\n            # trlpatch: sleep\n            _trlpatch.sleep(self, self.llm)\n",
    )
    check_patched("sleep", "rloo", "0.23.1", before, after)


def test_other_remote_calls_and_sleeps_are_left_alone():
    text = """\
class VLLMGeneration:
    def generate(self, prompts):
        time.sleep(2)
        self.llm.collective_rpc("close_communicator")
"""
    check_drift(
        "sleep", "vllm_generation", "1.16.0", text, "sleep_call: expected 2, found 0", lookalike="3: time.sleep(2)"
    )


def test_a_reload_that_came_back_is_drift():
    text = """\
class VLLMGeneration:
    def generate(self, prompts):
        self.llm.sleep(level=2)
        self.llm.sleep(level=2)
        self.llm.wake_up(tags=["weights"])
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.collective_rpc("reload_weights")
"""
    check_drift("sleep", "vllm_generation", "1.10.0", text, "reload_call: expected 0, found 1")
