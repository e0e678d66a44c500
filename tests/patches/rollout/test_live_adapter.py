import pytest

from tests.helpers import check_drift, check_patched


def trainer(call: str) -> str:
    return f"class VLLMGeneration:\n    def generate(self, prompts):\n        all_outputs = {call}\n"


def patched(call: str) -> str:
    before, _, after = trainer(call).partition("        all_outputs")
    return f"{before}        # trlpatch: live_adapter\n        all_outputs{after}"


HOOK = "lora_request=_trlpatch.lora_request(self, self.llm)"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("self.llm.generate(prompts)", f"self.llm.generate(prompts, {HOOK})"),
        ("self.llm.generate()", f"self.llm.generate({HOOK})"),
        ("self.llm.generate(prompts,)", f"self.llm.generate(prompts,{HOOK},)".replace(",l", ", l")),
        ("self.llm.generate(*a, **kw)", f"self.llm.generate(*a, **kw, {HOOK})"),
        ("self.llm.generate(p for p in prompts)", f"self.llm.generate((p for p in prompts), {HOOK})"),
        (
            "self.llm.generate(prompts, lora_request=mine)",
            "self.llm.generate(prompts, lora_request=_trlpatch.lora_request(self, self.llm, mine))",
        ),
        (
            "self.llm.chat(prompts, chat_template=mine)",
            f"self.llm.chat(prompts, chat_template=_trlpatch.chat_template(self, mine), {HOOK})",
        ),
        (
            "decode(self.llm.generate(f(prompts), sampling_params=g(h())))",
            f"decode(self.llm.generate(f(prompts), sampling_params=g(h()), {HOOK}))",
        ),
    ],
)
def test_every_shape_of_call(before: str, after: str):
    check_patched("live_adapter", "vllm_generation", "1.16.0", trainer(before), patched(after))


def test_a_call_over_several_lines_keeps_its_layout_and_comments():
    before = trainer("self.llm.generate(\n            prompts,\n            use_tqdm=False,  # quiet\n        )")
    after = patched(
        "self.llm.generate(\n            prompts,\n            use_tqdm=False,  # quiet\n"
        f"            {HOOK},\n        )"
    )
    check_patched("live_adapter", "vllm_generation", "1.16.0", before, after)


def test_helper_functions_and_their_receivers():
    before = """\
def generate_rollout_completions(trainer, prompts):
    if as_chat:
        outputs = trainer.llm.chat(prompts)
    else:
        outputs = trainer.vllm_generation.llm.generate(prompts)
"""
    after = """\
def generate_rollout_completions(trainer, prompts):
    if as_chat:
        # trlpatch: live_adapter
        outputs = trainer.llm.chat(prompts, lora_request=_trlpatch.lora_request(trainer, trainer.llm), chat_template=_trlpatch.chat_template(trainer))
    else:
        # trlpatch: live_adapter
        outputs = trainer.vllm_generation.llm.generate(prompts, lora_request=_trlpatch.lora_request(trainer.vllm_generation, trainer.vllm_generation.llm))
"""  # noqa: E501
    check_patched("live_adapter", "openenv", "0.28.0", before, after)


def test_generate_on_a_model_or_a_client_is_no_rollout():
    check_drift(
        "live_adapter",
        "vllm_generation",
        "1.16.0",
        trainer("self.model.generate(prompts) or self.vllm_client.generate(prompts)"),
        "rollout_call: expected 1, found 0",
        lookalike="self.model.generate",
    )


def test_one_call_more_than_declared_is_drift():
    check_drift(
        "live_adapter",
        "vllm_generation",
        "1.16.0",
        trainer("self.llm.generate(a)") + "        more = self.llm.generate(b)\n",
        "rollout_call: expected 1, found 2",
    )
