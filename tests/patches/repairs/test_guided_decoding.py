import pytest

from tests.helpers import check_drift, check_patched

IMPORT = "    from vllm.sampling_params import GuidedDecodingParams"
BEFORE = """\
if is_vllm_available():
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import GuidedDecodingParams


class GRPOTrainer:
    def _generate(self):
        # None without a regex
        """
AFTER = BEFORE.replace(
    IMPORT, "    # trlpatch: guided_decoding\n    GuidedDecodingParams = _trlpatch.guided_decoding_params()"
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "params = SamplingParams(n=1, guided_decoding=guided)\n",
            "params = SamplingParams(n=1, **{_trlpatch.guided_decoding_field(): guided})\n",
        ),
        (
            'kwargs = {"n": 1, "guided_decoding": guided}\n',
            'kwargs = {"n": 1, _trlpatch.guided_decoding_field(): guided}\n',
        ),
        (
            'params["guided_decoding"] = GuidedDecodingParams(regex=r)\n',
            "params[_trlpatch.guided_decoding_field()] = GuidedDecodingParams(regex=r)\n",
        ),
    ],
    ids=["keyword", "dictionary", "subscript"],
)
def test_hooks_say_the_class_and_the_field(before: str, after: str):
    marker = "# trlpatch: guided_decoding\n        "
    check_patched("guided_decoding", "grpo", "0.18.2", BEFORE + before, AFTER + marker + after)


def test_the_name_of_a_server_option_is_another():
    text = BEFORE + 'kwargs = {"guided_decoding_regex": regex}\n'
    check_drift("guided_decoding", "grpo", "0.26.2", text, "guided_field: expected 1, found 0")


def test_an_import_under_another_name_is_drift():
    text = BEFORE.replace(IMPORT, IMPORT + " as G") + 'kwargs = {"guided_decoding": None}\n'
    reason = "guided_import: expected 1, found 0"
    check_drift("guided_decoding", "grpo", "0.26.2", text, reason, "GuidedDecodingParams as G")
