"""A small `VLLMGeneration` in the shape of TRL 1.16.0, with everything that the patches look for."""

from __future__ import annotations

from textwrap import dedent, indent

from tests.helpers import source
from trlpatch.rewrite.rewriter import Rewritten, rewrite

RELEASE = (1, 16, 0)

ENGINE = '''\
"""Generation. `self.llm.generate(prompts)` and LLM( in a docstring are no code."""

from vllm import LLM, SamplingParams


class VLLMGeneration:
    """Runs `self.llm.sleep(level=2)`, as its help text says."""

    def __init__(self, model, mode):
        self.model = model
        self.mode = mode
        self.llm = LLM(model=model.name_or_path)
        self.llm.sleep(level=2)

    def _push(self, name, param):
        self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights([(name, param)])

    def _push_all(self):
        model = self.model
        model.merge_adapter()
        for name, param in model.named_parameters():
            self._push(name, param)
        llm_model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        llm_model.load_weights([])
        model.unmerge_adapter()

    def sync_weights(self):
        """Synchronise."""
        accelerator = self.accelerator
        if self.mode == "colocate":
            self.llm.wake_up(tags=["weights"])
        self._push_all()
        self.llm.reset_prefix_cache()

    def generate(self, prompts):
        # self.llm.generate(prompts) is what comes.
        generation_kwargs = {"max_tokens": 2, "top_k": self.top_k}
        sampling_params = SamplingParams(**generation_kwargs)
        self.llm.wake_up(tags=["kv_cache"])
        vllm_prompts = [{"prompt_token_ids": ids} for ids in prompts]
        all_outputs = self.llm.generate(vllm_prompts, sampling_params=sampling_params)
        self.llm.sleep(level=2)
        outputs = [output.prompt_token_ids for output in all_outputs]
        return outputs
'''


def with_method(body: str) -> str:
    """Return the file with one more method, whose body is `body`."""
    return f"{ENGINE}\n    def more(self, prompts, executor, names):\n{indent(dedent(body), ' ' * 8)}\n"


def edited(old: str, new: str) -> str:
    """Return the file with one text in another's place."""
    assert ENGINE.count(old) == 1, old
    return ENGINE.replace(old, new)


def rewritten(text: str, skip: frozenset[str] = frozenset()) -> Rewritten:
    """Return what becomes of it."""
    return rewrite(source("vllm_generation", text), RELEASE, skip=skip)


def reasons(text: str) -> list[str]:
    """Return why it is refused."""
    return [outcome.reason for outcome in rewritten(text).failed]
