from tests.helpers import check_drift, check_patched


def test_inside_init_the_owner_is_args_because_self_has_none_yet():
    before = """\
class OnlineDPOTrainer:
    def __init__(self, model, args):
        self.generation_config = SamplingParams(
            n=2,  # 2 generations per prompt
        )
"""
    after = before.replace(
        "        self.generation_config = SamplingParams(",
        "        # trlpatch: sampling\n"
        "        self.generation_config = _trlpatch.sampling_params(args, SamplingParams)(",
    )
    check_patched("sampling", "online_dpo", "0.18.2", before, after)


def test_elsewhere_the_owner_is_self_or_the_trainer():
    method = "class VLLMGeneration:\n    def generate(self):\n        sampling_params = SamplingParams(**kwargs)\n"
    check_patched(
        "sampling",
        "vllm_generation",
        "1.16.0",
        method,
        method.replace("        sampling_params =", "        # trlpatch: sampling\n        sampling_params =").replace(
            "SamplingParams(", "_trlpatch.sampling_params(self, SamplingParams)("
        ),
    )
    helper = "def _build(trainer, overrides) -> SamplingParams:\n    return SamplingParams(**overrides)\n"
    check_patched(
        "sampling",
        "openenv",
        "0.26.0",
        helper,
        helper.replace(
            "    return SamplingParams(",
            "    # trlpatch: sampling\n    return _trlpatch.sampling_params(trainer, SamplingParams)(",
        ),
    )


def test_vllm_generation_is_told_the_trainers_arguments():
    before = """\
class GRPOTrainer:
    def __init__(self, model, args):
        self.vllm_generation = VLLMGeneration(
            model=self.model,
        )
"""
    after = before.replace(
        "        self.vllm_generation = VLLMGeneration(",
        "        # trlpatch: sampling\n        self.vllm_generation = _trlpatch.generation(args, VLLMGeneration)(",
    )
    check_patched("sampling", "grpo", "1.16.0", before, after)


def test_structured_outputs_params_is_another_class():
    text = "class VLLMGeneration:\n    def generate(self):\n        x = StructuredOutputsParams(regex=r)\n"
    check_drift("sampling", "vllm_generation", "1.16.0", text, "sampling_params: expected 1, found 0")
