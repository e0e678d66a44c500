from tests.helpers import check_drift, check_patched

BEFORE = """\
class VLLMGeneration:
    def generate(self):
        sampling_params = {
            "top_k": top_k,
            "max_tokens": self.max_completion_length,
        }
        generation_kwargs = {
            "n": 1,
            "top_k": top_k,
            "max_tokens": self.max_completion_length,
        }
"""


def test_only_what_becomes_sampling_params_here_goes_through_the_hook():
    after = BEFORE.replace(
        '            "n": 1,\n            "top_k": top_k,',
        '            "n": 1,\n            "top_k": _trlpatch.top_k(top_k),',
    ).replace("        generation_kwargs =", "        # trlpatch: top_k\n        generation_kwargs =")
    check_patched("top_k", "vllm_generation", "1.16.0", BEFORE, after)


def test_the_dictionary_for_transformers_is_another():
    text = BEFORE.replace("max_tokens", "max_new_tokens")
    check_drift("top_k", "vllm_generation", "1.16.0", text, "top_k: expected 1, found 0", '4: "top_k": top_k,')
