from tests.helpers import check_drift, check_patched

EARLY_RETURN = "        # trlpatch: adapter_sync\n        if _trlpatch.hand_over(self):\n            return\n"


def test_the_return_stands_after_a_leading_wake():
    before = '''\
class VLLMGeneration:
    def sync_weights(self):
        """Synchronize."""
        if self.enable_sleep_mode:
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False

        accelerator = self.accelerator
'''
    after = before.replace("= False\n\n", "= False\n" + EARLY_RETURN + "\n")
    check_patched("adapter_sync", "vllm_generation", "1.16.0", before, after)


def test_without_a_wake_it_is_the_first_statement_under_the_decorator():
    before = """\
class GRPOTrainer:
    @profiling_decorator
    def _move_model_to_vllm(self):
        # For DeepSpeed ZeRO-3
        plugin = self.accelerator.state.deepspeed_plugin
"""
    after = before.replace("        # For", EARLY_RETURN + "        # For")
    check_patched("adapter_sync", "grpo", "0.22.2", before, after)


def test_online_dpo_without_a_sync_method():
    before = """\
class OnlineDPOTrainer:
    def _generate_vllm(self, model, prompts):
        # Load the latest weights
        llm_model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        llm_model.load_weights(model.state_dict().items())
"""
    after = before.replace(
        "        llm_model.load",
        "        # trlpatch: adapter_sync\n        _trlpatch.hand_over(self) or llm_model.load",
    )
    check_patched("adapter_sync", "online_dpo", "0.18.2", before, after)


def test_pushes_of_single_parameters_are_left_alone():
    text = """\
class OnlineDPOTrainer:
    def _sync_fsdp_params_to_vllm(self, module):
        llm_model.load_weights([(full_name, param.data)])
"""
    check_drift(
        "adapter_sync",
        "online_dpo",
        "0.18.2",
        text,
        "state_dict_push: expected 1, found 0",
        lookalike="llm_model.load_weights([(full_name",
    )


def test_a_renamed_sync_method_is_drift():
    check_drift(
        "adapter_sync",
        "vllm_generation",
        "1.16.0",
        "class VLLMGeneration:\n    def sync_policy(self):\n        pass\n",
        "sync_method: expected 1, found 0",
        lookalike="2: def sync_policy(self):",
    )
