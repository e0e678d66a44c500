"""Every way of using an engine that patches do not know is refused, however it is written and wherever it stands."""

from __future__ import annotations

import pytest

from tests.rewrite.small_engine import ENGINE, edited, reasons, rewritten, with_method
from trlpatch.outcomes import ENGINE_USE


def test_what_the_patches_know_is_clean():
    result = rewritten(ENGINE)
    assert [outcome.reason for outcome in result.failed] == []
    assert {outcome.patch for outcome in result.outcomes if outcome.status == "applied"} >= {
        "adapter_sync",
        "engine_reuse",
        "live_adapter",
        "sampling",
        "sleep",
    }


SPELLINGS = {
    "alias": "engine = self.llm\nreturn engine.generate(prompts)",
    "second alias in a tuple": "engine, _ = self.llm, 1\nreturn engine.generate(prompts)",
    "walrus": "return (engine := self.llm).generate(prompts)",
    "with": "with self.llm as engine:\n    return engine.generate(prompts)",
    "bound method": "sample = self.llm.generate\nreturn sample(prompts)",
    "getattr": "return getattr(self, 'llm').generate(prompts)",
    "getattr of the method": "return getattr(self.llm, 'generate')(prompts)",
    "a text that is put together": "return getattr(self, 'l' 'lm').generate(prompts)",
    "attrgetter": "return operator.attrgetter('vllm_generation.llm')(self).generate(prompts)",
    "__dict__": "return self.__dict__['llm'].generate(prompts)",
    "lambda": "return (lambda engine: engine.generate(prompts))(self.llm)",
    "default of a lambda": "return (lambda engine=self.llm: engine.generate(prompts))()",
    "partial": "return functools.partial(self.llm.generate, prompts)()",
    "map": "return list(map(self.llm.generate, [prompts]))",
    "submit": "return executor.submit(self.llm.generate, prompts).result()",
    "of the class": "return LLM.generate(self.llm, prompts)",
    "loop": "return [engine.generate(prompts) for engine in [self.llm]]",
    "loop over a list that is kept": "for engine in self.llm, self.other:\n    engine.generate(prompts)",
    "helper": "return sample(self.llm, prompts)",
    "helper by keyword": "return sample(engine=self.llm)",
    "helper, unpacked": "return sample(*[self.llm], **{'engine': self.llm})",
    "another attribute": "self.rollout_engine = self.llm\nreturn self.rollout_engine.generate(prompts)",
    "returned": "return self.llm",
    "yielded": "yield self.llm",
    "conditional": "return (self.llm if prompts else self.other).generate(prompts)",
    "or": "return (self.llm or self.other).generate(prompts)",
    "awaited": "engine = copy.copy(self.llm)\nreturn engine.chat(prompts)",
    "over lines": "return (\n    self.llm\n    .generate(\n        prompts\n    )\n)",
    "global name": "global llm\nllm = self.llm\nreturn llm.generate(prompts)",
    "a second engine": "self.other = LLM('m')\nreturn self.other.generate(prompts)",
    "a second engine of another class": "return AsyncLLMEngine.from_engine_args(prompts)",
    "vllm.LLM": "return vllm.LLM('m').generate(prompts)",
    "set anew": "self.llm = self.build()",
    "subclass": "class Mine(LLM):\n    pass",
    "import under another name": "from vllm import LLM as Engine\nreturn Engine('m').generate(prompts)",
    "star import": "return importlib.import_module('vllm').LLM",
}


@pytest.mark.parametrize("body", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_of_a_second_rollout_is_refused(body: str):
    assert reasons(with_method(body))


@pytest.mark.parametrize(
    "call",
    [
        "self.llm.beam_search(prompts)",
        "self.llm.encode(prompts)",
        "self.llm.score(prompts, prompts)",
        "self.llm.embed(prompts)",
        "self.llm.a_method_of_next_year(prompts)",
        "self.llm.llm_engine.add_request('1', prompts, None)",
        "self.llm.llm_engine.step()",
        "self.llm.collective_rpc('load_weights', args=(names,))",
        "self.llm.collective_rpc(names)",
        "self.llm.collective_rpc(method='reload_weights')",
        "self.llm.apply_model(lambda model: model.load_weights(names))",
        "self.llm.load_weights(names)",
        "self.llm.reload_weights()",
        "self.llm.update_weights(names)",
        "self.llm.llm_engine.sleep()",
        "self.llm.llm_engine.wake_up()",
        "self.llm.llm_engine.collective_rpc('reload_weights')",
        "self.llm.llm_engine.model_executor.collective_rpc('reload_weights')",
        "self.llm.llm_engine.model_executor.driver_worker.model_runner.model(prompts)",
        "self.llm.llm_engine.engine_core.sleep()",
        "self.engine.wake_up()",
        "self.engine.collective_rpc('reload_weights')",
        "self.worker.load_weights(names)",
        "operator.methodcaller('collective_rpc', 'reload_weights')(self.engine)",
        "self.llm.sleep(level=1)",
        "self.llm.wake_up()",
        "self.llm.collective_rpc('reload_weights')",
        "self.llm.generate(prompts, lora_request=self.lora)",
        "self.llm.llm_engine.model_config.max_model_len = 3",
    ],
)
def test_every_method_that_no_patch_knows_is_refused(call: str):
    assert reasons(with_method(call))


PLACES = {
    "async method": "\n    async def more(self, prompts):\n        {}\n",
    "function of the module": "\n\ndef helper(self, prompts):\n    {}\n",
    "async function of the module": "\n\nasync def helper(self, prompts):\n    {}\n",
    "module": "\n\n{}\n",
    "under if of the module": "\n\nif True:\n    {}\n",
    "another class": "\n\nclass Callback:\n    def on_step_end(self, prompts):\n        {}\n",
    "nested class": "\n    class Callback:\n        def on_step_end(self, prompts):\n            {}\n",
    "method under if": "\n    if True:\n        def more(self, prompts):\n            {}\n",
    "method under try": "\n    try:\n        def more(self, prompts):\n            {}\n    finally:\n        pass\n",
    "class body": "\n    {}\n",
    "nested function": "\n    def more(self, prompts):\n        def inner():\n            {}\n",
    "property": "\n    @property\n    def more(self):\n        {}\n",
    "decorated": "\n    @profiling\n    def more(self, prompts):\n        {}\n",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize(
    "statement",
    [
        "outputs = self.llm.generate(prompts)",
        "outputs = self.vllm_generation.llm.chat(prompts)",
        "self.llm.sleep(level=2)",
        "self.llm.collective_rpc('reload_weights')",
        "params = SamplingParams(n=1)",
        "more = lambda self, prompts: self.llm.generate(prompts)",
    ],
)
def test_a_call_in_the_patches_own_spelling_is_refused_wherever_they_do_not_look(place: str, statement: str):
    assert reasons(ENGINE + place.format(statement))


@pytest.mark.parametrize(
    "statement",
    [
        "tokenizer = self.llm.get_tokenizer()",
        "self.llm.reset_prefix_cache()",
        "length = self.llm.llm_engine.model_config.max_model_len",
        "ready = self.llm is not None",
        "ready = getattr(self, 'llm', None) is not None",
        "ready = hasattr(self, 'llm')",
        "ready = isinstance(self.llm, LLM)",
        "if not self.llm:\n    return",
        "if self.llm:\n    return",
        "self.llm = None",
        "self.llm: 'LLM | None' = None",
        "del self.llm",
        "help = 'use self.llm.generate(prompts) or LLM(model)'",
        "def inner(engine: LLM, other: 'LLM') -> LLM:\n    return prompts",
        "self.model.generate(prompts)",
        "self.vllm_client.generate(prompts)",
        "self.vllm_client.reset_prefix_cache()",
        "time.sleep(3)",
        "# self.llm.generate(prompts)\npass",
        "'''self.llm.generate(prompts)'''",
    ],
)
def test_what_neither_samples_nor_pushes_is_no_alarm(statement: str):
    assert reasons(with_method(statement)) == []


def test_a_finding_names_its_place_upstream_and_what_to_do():
    text = with_method("x = 1\nengine = self.llm")
    (failure,) = rewritten(text).failed
    line = text.splitlines().index("        engine = self.llm") + 1
    assert (failure.patch, failure.target) == (ENGINE_USE, "vllm_generation")
    assert "handed on under another name" in failure.reason
    assert "a patch has to learn this form" in failure.reason
    assert failure.drift is not None
    assert (failure.drift.line, failure.drift.qualname) == (line, "VLLMGeneration.more")
    assert failure.drift.lookalike == f"{line}: engine = self.llm"
    assert rewritten(text).text == text


def test_patches_left_out_on_purpose_leave_their_calls_to_trl():
    result = rewritten(ENGINE, frozenset({"sleep", "engine_reuse", "sampling"}))
    assert [outcome.reason for outcome in result.failed] == []
    rollout = "self.llm.generate(_trlpatch.image_prompts(self, vllm_prompts), sampling_params=sampling_params)"
    assert rollout in result.text
    assert "self.llm = LLM(" in result.text


def test_patches_left_out_on_purpose_allow_no_more_than_that():
    text = edited("        return outputs\n", "        return outputs, self.llm\n")
    (failure,) = rewritten(text, frozenset({"sleep"})).failed
    assert "handed on under another name" in failure.reason
