"""R: the rollout call that is there, written otherwise."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.mutation.hosts import Host
from tests.mutation.mutants import kind


@dataclass(frozen=True)
class Rollout:
    """A rollout call in pieces: `engine`.`method`(`arguments`)."""

    host: Host
    call: ast.Call
    engine: str
    method: str
    arguments: str

    def more(self, argument: str) -> str:
        """Return the arguments with one more."""
        return f"{self.arguments.rstrip().rstrip(',')}, {argument}"

    @property
    def prompts(self) -> str:
        return self.host.segment(self.call.args[0])


def pieces(host: Host, call: ast.Call) -> Rollout:
    assert isinstance(call.func, ast.Attribute)
    inside = host.segment(call)[len(host.segment(call.func)) :].strip()[1:-1]
    return Rollout(host, call, host.segment(call.func.value), call.func.attr, inside)


def rewritten(make: Callable[[Rollout], str]) -> Callable[[Rollout], str]:
    """Register a kind that puts an expression in the place of each rollout call."""

    def each(host: Host) -> Iterator[str]:
        for call in host.rollouts:
            yield host.replace(call, make(pieces(host, call)))

    each.__doc__ = make.__doc__
    kind("R", name=make.__name__)(each)
    return make


def around(make: Callable[[Host, ast.stmt, str], str]) -> Callable[[Host, ast.stmt, str], str]:
    """Register a kind that puts statements in the place of each statement that rolls out; it gets its text."""

    def each(host: Host) -> Iterator[str]:
        for call in host.rollouts:
            statement = host.statement(call)
            # Its text at a margin of none: lines after the first one keep their distance to it.
            text = re.sub(rf"(?m)^ {{{statement.col_offset}}}", "", host.segment(statement))
            start, end = host.lines(statement)
            margin = " " * statement.col_offset
            changed = make(host, statement, text)
            yield host.edit(((start, end), "".join(f"{margin}{line}\n" for line in changed.splitlines())))

    each.__doc__ = make.__doc__
    kind("R", name=make.__name__)(each)
    return make


def _shifted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


@rewritten
def one_more_keyword(call: Rollout) -> str:
    """vLLM gains an argument, and TRL passes it."""
    return f"{call.engine}.{call.method}({call.more('priority=None')})"


@rewritten
def keyword_dropped(call: Rollout) -> str:
    """TRL no longer passes `use_tqdm`."""
    return f"{call.engine}.{call.method}({call.arguments.replace('use_tqdm=False', '').rstrip().rstrip(',')})"


@rewritten
def positional_sampling_params(call: Rollout) -> str:
    """Sampling parameters are passed by position."""
    return f"{call.engine}.{call.method}({call.arguments.replace('sampling_params=', '')})"


@rewritten
def keywords_in_another_order(call: Rollout) -> str:
    """`use_tqdm` comes first among the keywords."""
    arguments = call.arguments.replace("use_tqdm=False", "").rstrip().rstrip(",")
    return (
        f"{call.engine}.{call.method}(use_tqdm=False, *[{call.prompts}], **{{}})"
        if not arguments
        else (f"{call.engine}.{call.method}(*({call.prompts},), use_tqdm=False)")
    )


@rewritten
def prompts_by_keyword(call: Rollout) -> str:
    """Prompts are passed by keyword."""
    return f"{call.engine}.{call.method}({'prompts' if call.method == 'generate' else 'messages'}={call.arguments})"


@rewritten
def none_as_adapter(call: Rollout) -> str:
    """TRL says `lora_request=None` outright."""
    return f"{call.engine}.{call.method}({call.more('lora_request=None')})"


@rewritten
def an_adapter_of_its_own(call: Rollout) -> str:
    """TRL starts to send a request of its own (trl #2730 and its like)."""
    own = f"lora_request={call.host.receiver}.lora"
    return f"{call.engine}.{call.method}({call.more(own)})"


@rewritten
def adapter_in_star_keywords(call: Rollout) -> str:
    """The arguments come as a dictionary that also names an adapter."""
    return f"{call.engine}.{call.method}({call.prompts}, **{{'lora_request': None, 'use_tqdm': False}})"


@rewritten
def star_keywords(call: Rollout) -> str:
    """Options of the call are collected in a dictionary."""
    return f"{call.engine}.{call.method}({call.prompts}, **dict(use_tqdm=False))"


@rewritten
def star_arguments(call: Rollout) -> str:
    """The arguments are collected in a tuple."""
    return f"{call.engine}.{call.method}(*[{call.prompts}], use_tqdm=False)"


@rewritten
def over_three_lines(call: Rollout) -> str:
    """A formatter breaks the call behind the engine."""
    return f"(\n{call.engine}\n.{call.method}(\n{call.arguments}\n)\n)"


@rewritten
def with_a_comment_inside(call: Rollout) -> str:
    """A comment stands between the arguments."""
    arguments = call.arguments.rstrip().rstrip(",")
    return f"{call.engine}.{call.method}(  # one request per prompt\n{arguments},  # the rest\n)"


@rewritten
def with_parentheses(call: Rollout) -> str:
    """Parentheses around the engine."""
    return f"({call.engine}).{call.method}({call.arguments})"


@rewritten
def bare_generator_as_prompts(call: Rollout) -> str:
    """Prompts are a generator, the call's only argument."""
    return f"{call.engine}.{call.method}(prompt for prompt in {call.prompts})"


@rewritten
def sliced_result(call: Rollout) -> str:
    """What comes back is sliced at once."""
    return f"{call.engine}.{call.method}({call.arguments})[:]"


@rewritten
def in_a_list(call: Rollout) -> str:
    """What comes back is copied at once."""
    return f"list({call.engine}.{call.method}({call.arguments}))"


@rewritten
def in_a_conditional(call: Rollout) -> str:
    """An empty batch asks for nothing."""
    return f"({call.engine}.{call.method}({call.arguments}) if {call.prompts} else [])"


@rewritten
def in_a_lambda(call: Rollout) -> str:
    """The call is retried, so it is made in a lambda."""
    return f"(lambda: {call.engine}.{call.method}({call.arguments}))()"


@rewritten
def in_a_comprehension(call: Rollout) -> str:
    """One request per prompt."""
    return f"[output for prompt in {call.prompts} for output in {call.engine}.{call.method}([prompt], use_tqdm=False)]"


@rewritten
def nested_in_another_call(call: Rollout) -> str:
    """The prompts come from a first call of the same engine."""
    return f"{call.engine}.{call.method}({call.engine}.{call.method}({call.arguments}), use_tqdm=False)"


@rewritten
def both_methods(call: Rollout) -> str:
    """Conversational prompts go one way, the others another, in one expression."""
    one, other = (f"{call.engine}.{name}({call.arguments})" for name in ("chat", "generate"))
    return f"({one} if {call.host.receiver}.use_vllm else {other})"


@rewritten
def chat_instead_of_generate(call: Rollout) -> str:
    """TRL goes over to `LLM.chat`, or back."""
    return f"{call.engine}.{'chat' if call.method == 'generate' else 'generate'}({call.arguments})"


def _another_method(name: str, method: str, why: str) -> None:
    def change(call: Rollout) -> str:
        return f"{call.engine}.{method}({call.arguments})"

    change.__name__, change.__doc__ = name, why
    rewritten(change)


_another_method("beam_search_instead", "beam_search", "TRL samples with beams.")
_another_method("encode_instead", "encode", "TRL pools instead of generating.")
_another_method("llm_engine_instead", "llm_engine.generate", "TRL asks the engine inside of the LLM.")
_another_method("generate_async_instead", "generate_async", "TRL goes over to an asynchronous engine.")
_another_method("enqueue_instead", "enqueue", "vLLM 0.19 and newer take requests without waiting for them.")
_another_method("engine_attribute_renamed_below", "engine.generate", "The LLM is wrapped in an object of TRL's.")


@rewritten
def by_getattr(call: Rollout) -> str:
    """The method is chosen by its name."""
    return f'getattr({call.engine}, "{call.method}")({call.arguments})'


@rewritten
def by_getattr_of_a_setting(call: Rollout) -> str:
    """The method is chosen by a setting."""
    return f'getattr({call.engine}, "chat" if {call.host.receiver}.use_chat else "generate")({call.arguments})'


@rewritten
def by_partial(call: Rollout) -> str:
    """The call is bound with functools.partial."""
    return f"__import__('functools').partial({call.engine}.{call.method}, {call.arguments})()"


@rewritten
def by_bound_method(call: Rollout) -> str:
    """The method is taken first, in the same expression."""
    return f"(roll := {call.engine}.{call.method})({call.arguments})"


@rewritten
def by_walrus(call: Rollout) -> str:
    """The engine gets a shorter name in the same expression."""
    return f"(engine := {call.engine}).{call.method}({call.arguments})"


@rewritten
def by_conditional_engine(call: Rollout) -> str:
    """One of two engines is asked."""
    return f"({call.engine} if {call.host.receiver}.use_vllm else None).{call.method}({call.arguments})"


@rewritten
def by_class(call: Rollout) -> str:
    """The method is taken from the class."""
    return f"LLM.{call.method}({call.engine}, {call.arguments})"


@rewritten
def by_a_getter(call: Rollout) -> str:
    """The engine is behind a method."""
    return f"{call.host.owner}.get_engine().{call.method}({call.arguments})"


@rewritten
def by_another_owner(call: Rollout) -> str:
    """The engine moved into an object of its own."""
    return f"{call.host.receiver}.rollout_engine.{call.host.attribute}.{call.method}({call.arguments})"


@rewritten
def by_another_attribute(call: Rollout) -> str:
    """The attribute of the engine has another name here, and is set somewhere else."""
    return f"{call.host.owner}.rollout_llm.{call.method}({call.arguments})"


@rewritten
def removed(call: Rollout) -> str:
    """The rollout is made somewhere else."""
    return f"{call.host.receiver}._roll_out({call.arguments})"


@around
def alias_before(host: Host, statement: ast.stmt, text: str) -> str:
    """A local name stands for the engine."""
    return f"llm = {host.engine}\n{text.replace(host.engine + '.', 'llm.')}"


@around
def bound_method_before(host: Host, statement: ast.stmt, text: str) -> str:
    """A local name stands for the method."""
    return f"generate = {host.engine}.generate\n{text.replace(host.engine + '.generate(', 'generate(')}"


@around
def annotated_result(host: Host, statement: ast.stmt, text: str) -> str:
    """The result gets a type."""
    name, _, value = text.partition(" = ")
    return f"{name}: list = {value}"


@around
def two_names_for_the_result(host: Host, statement: ast.stmt, text: str) -> str:
    """The result is kept for logging, too."""
    return f"{host.receiver}._last_outputs = {text}"


@around
def in_a_try(host: Host, statement: ast.stmt, text: str) -> str:
    """A failing engine is reported."""
    return f"try:\n{_shifted(text)}\nexcept RuntimeError:\n    raise"


@around
def in_a_with(host: Host, statement: ast.stmt, text: str) -> str:
    """The call is timed."""
    return f"with open('/dev/null'):\n{_shifted(text)}"


@around
def in_an_if(host: Host, statement: ast.stmt, text: str) -> str:
    """Evaluation asks otherwise: both branches roll out."""
    return f"if {host.receiver}.use_vllm:\n{_shifted(text)}\nelse:\n{_shifted(text)}"


@around
def in_a_loop(host: Host, statement: ast.stmt, text: str) -> str:
    """Prompts go in batches."""
    return f"for _ in range(2):\n{_shifted(text)}"


@around
def in_a_nested_function(host: Host, statement: ast.stmt, text: str) -> str:
    """The call becomes a local function."""
    name, _, value = text.partition(" = ")
    return f"def roll():\n    return (\n{_shifted(_shifted(value))}\n    )\n\n{name} = roll()"


@around
def in_a_while(host: Host, statement: ast.stmt, text: str) -> str:
    """The call is repeated until it succeeds."""
    return f"while True:\n{_shifted(text)}\n    break"


@around
def in_a_match(host: Host, statement: ast.stmt, text: str) -> str:
    """The mode is matched."""
    return f"match {host.receiver}.use_vllm:\n    case _:\n{_shifted(_shifted(text))}"


@around
def twice(host: Host, statement: ast.stmt, text: str) -> str:
    """A second request follows the first one, for shortened prompts."""
    return f"{text}\n{text}"


@kind("R")
def moved_to_a_helper_method(host: Host) -> Iterator[str]:
    """The call moves into a method of its own, as `_generate_vllm_colocate` did in 0.23."""
    for call in host.rollouts:
        old = pieces(host, call)
        moved = host.replace(
            call,
            f"{host.receiver}._roll_out({old.arguments})"
            if host.cls
            else f"_roll_out({host.receiver}, {old.arguments})",
        )
        changed = Host(host.release, host.path, host.cls, moved)
        yield changed.with_method(
            f"def _roll_out({host.receiver}, prompts, sampling_params=None, use_tqdm=False):\n"
            f"    outputs = {old.engine}.{old.method}(prompts, sampling_params=sampling_params, use_tqdm=use_tqdm)\n"
            "    return outputs\n"
        )


@kind("R")
def engine_attribute_renamed(host: Host) -> str:
    """The engine's attribute gets another name everywhere in the file."""
    return re.sub(rf"\.{host.attribute}\b", ".vllm", host.text)


@kind("R")
def method_renamed(host: Host) -> str | None:
    """The method that rolls out gets another name, here and where it is called."""
    name = host.function(host.rollouts[0]).name
    return re.sub(rf"\b{name}\b", f"{name}_in_process", host.text)
