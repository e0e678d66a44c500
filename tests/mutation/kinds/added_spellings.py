"""A: a second rollout, in every spelling that upstream might use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.mutation.hosts import Host, rollout_hosts, standing_hosts
from tests.mutation.mutants import kind

PARAMETERS = "prompts, sampling_params=None"


def method(host: Host, body: str, head: str = "def _second_rollout") -> str:
    """Return the text with a method of this body, or a function that takes the trainer."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return host.with_method(f"{head}({host.receiver}, {PARAMETERS}):\n{lines}")


def everywhere(release: str) -> Iterator[Host]:
    yield from rollout_hosts(release)
    yield from standing_hosts(release)


def spelled(make: Callable[[Host], str]) -> Callable[[Host], str]:
    """Register a kind whose function returns the body of the new method."""

    def add(host: Host) -> str:
        return method(host, make(host))

    add.__doc__ = make.__doc__
    kind("A", former_survivor=True, name=make.__name__)(add)
    return make


def _known(name: str, body: str, why: str) -> None:
    def add(host: Host) -> str:
        return method(host, body.format(engine=host.engine))

    add.__doc__ = why
    kind("A", everywhere, name=name)(add)


_known("second_generate", "return {engine}.generate(prompts, sampling_params)", "A new method rolls out, canonically.")
_known("second_chat", "outputs = {engine}.chat(prompts, sampling_params)\nreturn outputs", "A new method chats.")
_known("second_generate_for_evaluation", "if prompts:\n    return {engine}.generate(prompts)", "Evaluation rolls out.")


def _spelling(name: str, body: str, why: str) -> None:
    def add(host: Host) -> str:
        return body.format(engine=host.engine, owner=host.owner, attribute=host.attribute)

    add.__name__, add.__doc__ = name, why
    spelled(add)


_spelling("alias", "engine = {engine}\nreturn engine.generate(prompts)", "A local name stands for the engine.")
_spelling("annotated_alias", "engine: object = {engine}\nreturn engine.generate(prompts)", "The same, with a type.")
_spelling("two_aliases", "a = b = {engine}\nreturn b.generate(prompts)", "Two names in one assignment.")
_spelling("unpacked_alias", "engine, p = {engine}, prompts\nreturn engine.generate(p)", "A tuple is unpacked.")
_spelling("walrus_alias", "return (engine := {engine}).generate(prompts)", "An assignment expression.")
_spelling("bound_method", "generate = {engine}.generate\nreturn generate(prompts)", "The method gets a name.")
_spelling("getattr_method", 'return getattr({engine}, "generate")(prompts)', "The method is looked up by name.")
_spelling("getattr_engine", 'return getattr({owner}, "{attribute}").generate(prompts)', "The engine, too.")
_spelling("dict_engine", 'return {owner}.__dict__["{attribute}"].generate(prompts)', "Out of the instance's dict.")
_spelling("vars_engine", 'return vars({owner})["{attribute}"].generate(prompts)', "Out of `vars`.")
_spelling("getattribute", 'return {owner}.__getattribute__("{attribute}").generate(prompts)', "By dunder.")
_spelling("lambda_parameter", "return (lambda engine: engine.generate(prompts))({engine})", "A lambda takes it.")
_spelling("lambda_closure", "roll = lambda: {engine}.generate(prompts)\nreturn roll()", "A lambda closes over it.")
_spelling("map_over_prompts", "return list(map({engine}.generate, [prompts]))", "The method goes to map().")
_spelling("submitted", "return {owner}.executor.submit({engine}.generate, prompts)", "The method goes to an executor.")
_spelling(
    "in_a_thread", "from threading import Thread\nThread(target={engine}.generate, args=(prompts,)).start()", "Thread."
)
_spelling(
    "through_partial", "from functools import partial\nreturn partial({engine}.generate, prompts)()", "partial()."
)
_spelling(
    "methodcaller",
    'from operator import methodcaller\nreturn methodcaller("generate", prompts)({engine})',
    "operator.",
)
_spelling(
    "attrgetter",
    'from operator import attrgetter\nreturn attrgetter("{attribute}.generate")({owner})(prompts)',
    "operator.",
)
_spelling("through_the_class", "from vllm import LLM\nreturn LLM.generate({engine}, prompts)", "The class's function.")
_spelling("through_type", "return type({engine}).generate({engine}, prompts)", "The class of the instance.")
_spelling("loop_over_engines", "for engine in ({engine},):\n    return engine.generate(prompts)", "Several engines.")
_spelling("comprehension_over_engines", "return [e.generate(prompts) for e in [{engine}]]", "In a comprehension.")
_spelling("dictionary_of_engines", 'return {{"policy": {engine}}}["policy"].generate(prompts)', "By role.")
_spelling(
    "with_as",
    "from contextlib import nullcontext\nwith nullcontext({engine}) as e:\n    return e.generate(prompts)",
    "A context.",
)
_spelling("conditional_engine", "return ({engine} if prompts else None).generate(prompts)", "One of two engines.")
_spelling("or_engine", "return ({engine} or None).generate(prompts)", "A default engine.")
_spelling(
    "another_attribute", "{owner}.engine = {engine}\nreturn {owner}.engine.generate(prompts)", "Another attribute."
)
_spelling("setattr_engine", 'setattr({owner}, "roll", {engine}.generate)\nreturn {owner}.roll(prompts)', "setattr().")
_spelling("copied_engine", "import copy\nreturn copy.copy({engine}).generate(prompts)", "A copy.")
_spelling("matched_engine", "match {engine}:\n    case engine:\n        return engine.generate(prompts)", "match.")
_spelling(
    "given_as_default",
    "def roll(engine={engine}):\n    return engine.generate(prompts)\n\nreturn roll()",
    "A default.",
)
_spelling(
    "given_to_local",
    "def roll(engine):\n    return engine.generate(prompts)\n\nreturn roll({engine})",
    "A local function.",
)
_spelling(
    "yielded_engine",
    "def engines():\n    yield {engine}\n\nfor e in engines():\n    return e.generate(prompts)",
    "yield.",
)
_spelling("returned_engine", "def engine():\n    return {engine}\n\nreturn engine().generate(prompts)", "A getter.")
_spelling(
    "deleted_alias", "e = {engine}\noutputs = e.generate(prompts)\ndel e\nreturn outputs", "An alias that is deleted."
)
_spelling("global_alias", "global _engine\n_engine = {engine}\nreturn _engine.generate(prompts)", "A global.")
_spelling("list_of_engines", "engines = [{engine}]\nreturn engines[0].generate(prompts)", "A list of engines.")
_spelling("starred_engine", "first, *_ = [{engine}]\nreturn first.generate(prompts)", "A starred assignment.")
_spelling("beam_search", "return {engine}.beam_search(prompts, sampling_params)", "Beams.")
_spelling("encode", "return {engine}.encode(prompts)", "Rewards from the policy's engine.")
_spelling("score", "return {engine}.score(prompts, prompts)", "Scores from the policy's engine.")
_spelling("classify", "return {engine}.classify(prompts)", "Classes from the policy's engine.")
_spelling("embed", "return {engine}.embed(prompts)", "Embeddings from the policy's engine.")
_spelling("enqueue", "return {engine}.enqueue(prompts, sampling_params)", "Requests without waiting.")
_spelling("add_request", '{engine}.llm_engine.add_request("0", prompts, sampling_params)', "Requests one by one.")
_spelling("core_add_request", "{engine}.llm_engine.engine_core.add_request(prompts)", "Below the LLM.")
_spelling(
    "alias_of_llm_engine", 'e = {engine}.llm_engine\ne.add_request("0", prompts, sampling_params)', "An alias below."
)
_spelling("step", "return {engine}.llm_engine.step()", "The engine is stepped by hand.")
_spelling("run_completion", "return {engine}._run_completion(prompts, sampling_params)", "vLLM's private way in.")
_spelling(
    "worker_rollout", 'return {engine}.collective_rpc("execute_model", args=(prompts,))', "The workers are asked."
)
_spelling(
    "worker_model_rollout",
    "return {engine}.llm_engine.model_executor.driver_worker.model_runner.model(prompts)",
    "The model.",
)
_spelling(
    "over_two_lines",
    "return (\n    {engine}\n    .generate(\n        prompts\n    )\n)",
    "A formatter breaks the call.",
)
_spelling("in_an_f_string", 'return f"{{{engine}.generate(prompts)}}"', "Within a text.")
_spelling("in_an_assert", "assert {engine}.generate(prompts)", "Within an assertion.")


@spelled
def asyncio_run(host: Host) -> str:
    """An asynchronous function rolls out."""
    rolls = f"async def roll():\n    return {host.engine}.beam_search(prompts)\n"
    return f"import asyncio\n\n{rolls}\nreturn asyncio.run(roll())"
