from tests.helpers import check_drift, check_patched

BEFORE = """\
class VLLMGeneration:
    def _init_vllm(self):
        model = self.model
        # Build LLM initialization kwargs
        self.llm = LLM(
            model=model.name_or_path,
            max_num_batched_tokens=4096,  # vLLM's profiler
        )
"""


def test_the_hook_stands_for_the_class_and_the_arguments_stay():
    after = BEFORE.replace(
        "        self.llm = LLM(\n",
        "        # trlpatch: engine_reuse\n        self.llm = _trlpatch.engine(self, model, LLM)(\n",
    )
    check_patched("engine_reuse", "vllm_generation", "1.16.0", BEFORE, after)


def test_keyword_dictionary_and_golds_attribute():
    before = "class GOLDTrainer:\n    def __init__(self, model, args):\n        self.vllm_engine = LLM(**kwargs)\n"
    after = before.replace(
        "        self.vllm_engine = LLM(",
        "        # trlpatch: engine_reuse\n        self.vllm_engine = _trlpatch.engine(self, model, LLM)(",
    )
    check_patched("engine_reuse", "gold", "0.25.0", before, after)


def test_a_second_engine_in_the_file_is_drift():
    twice = BEFORE + "        self.judge = LLM(model='judge')\n"
    check_drift("engine_reuse", "vllm_generation", "1.16.0", twice, "engine_constructor: expected 1, found 2")


def test_a_renamed_class_is_drift_with_its_lookalike():
    check_drift(
        "engine_reuse",
        "vllm_generation",
        "1.16.0",
        BEFORE.replace("LLM(\n", "AsyncLLMEngine(\n"),
        "engine_constructor: expected 1, found 0",
        lookalike="5: self.llm = AsyncLLMEngine(",
    )
