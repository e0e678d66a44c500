from tests.helpers import check_drift, check_patched

BEFORE = """\
if is_vllm_available():
    import vllm.model_executor.model_loader.weight_utils

    import vllm.transformers_utils.tokenizer

    def get_cached_tokenizer(tokenizer):
        return tokenizer

    # Overwrite the function in the dependency
    vllm.transformers_utils.tokenizer.get_cached_tokenizer = get_cached_tokenizer
"""


def test_the_import_and_the_assignment_ask_the_hook():
    after = BEFORE.replace(
        "    import vllm.transformers_utils.tokenizer\n",
        "    # trlpatch: vllm_tokenizer\n    _trlpatch.vllm_tokenizer()\n",
    ).replace(
        "    vllm.transformers_utils.tokenizer.get",
        "    # trlpatch: vllm_tokenizer\n    _trlpatch.vllm_tokenizer().get",
    )
    check_patched("vllm_tokenizer", "trl", "0.26.2", BEFORE, after)


def test_without_the_assignment_it_is_drift():
    text = BEFORE.replace("vllm.transformers_utils.tokenizer.get", "tokenizer.get")
    check_drift("vllm_tokenizer", "trl", "0.26.2", text, "tokenizer_overwrite: expected 1, found 0")
