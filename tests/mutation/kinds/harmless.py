"""B: edits of what is there that upstream makes every week and that must not be refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from tests.mutation.hosts import Host
from tests.mutation.kinds.added_spellings import everywhere
from tests.mutation.mutants import Change, kind


def harmless(make: Callable[[Host], Change | Iterator[Change]]) -> Callable[[Host], Change | Iterator[Change]]:
    kind("B", everywhere)(make)
    return make


def _first_function(on: Host) -> ast.FunctionDef:
    return (
        on.function(on.rollouts[0])
        if on.rollouts
        else next(f for f in (on.class_node.body if on.class_node else []) if isinstance(f, ast.FunctionDef))
    )


@harmless
def trailing_comment(on: Host) -> Iterator[str]:
    """A comment behind the call that mentions it."""
    for call in on.rollouts or [None]:
        statement = on.statement(call) if call else on.tree.body[-1]
        end = on.lines(statement)[1] - 1
        yield on.edit(((end, end), "  # self.llm.generate(prompts) asks vLLM"))


@harmless
def comment_above(on: Host) -> Iterator[str]:
    """A comment above the rollout, the sync and the constructor that mentions all of them."""
    comment = "# self.llm.generate(...), self.llm.sleep(level=2), LLM(...), llm_model.load_weights(...)"
    yield on.before(on.body(_first_function(on))[0], comment)
    if on.rollouts:
        yield on.before(on.statement(on.rollouts[0]), comment)


@harmless
def docstring_mentions_the_engine(on: Host) -> str:
    """A docstring explains `self.llm.generate(...)`."""
    return on.with_method(f'''
        def _explained({on.receiver}):
            """Return nothing.

            Calls self.llm.generate(prompts) and self.llm.sleep(level=2), builds LLM(model), and so on:

                >>> trainer.llm.chat(messages)
                >>> SamplingParams(n=1)
            """
    ''')


@harmless
def class_docstring_mentions_the_engine(on: Host) -> str | None:
    """The class's docstring explains `self.llm.generate(...)`."""
    if on.class_node is None:
        return None
    more = "Calls self.llm.generate(x), self.llm.wake_up(), LLM(y), SamplingParams(z)."
    first = on.class_node.body[0]
    if ast.get_docstring(on.class_node) is None:
        return on.before(first, f'"""{more}"""')
    end = on.span(first)[1] - len('"""')
    return on.edit(((end, end), f"\n{more}\n"))


@harmless
def module_docstring(on: Host) -> str:
    """The module gets a docstring that mentions the engine."""
    first = on.tree.body[0]
    return on.before(first, '"""Trainers whose rollouts run in self.llm.generate(prompts)."""')


@harmless
def error_message_mentions_the_engine(on: Host) -> str:
    """An error's text names the call."""
    code = (
        'if self.fails:\n    raise ValueError("call self.llm.generate(x), self.llm.sleep(level=2) or LLM(...) first")'
    )
    return on.before(on.body(_first_function(on))[-1], code.replace("self.fails", f"{on.receiver}.fails is Ellipsis"))


@harmless
def log_line(on: Host) -> str:
    """A log line before the rollout that names the call."""
    return on.before(on.body(_first_function(on))[0], 'print("self.llm.generate(prompts) is next")')


@harmless
def help_text(on: Host) -> str:
    """A constant holds a text that names the call, over several lines."""
    return on.with_function(
        'HELP = (\n    "The engine sleeps: self.llm.sleep(level=2); "\n    "LLM(model), SamplingParams(n=1)"\n)\n'
    )


@harmless
def formatted_over_more_lines(on: Host) -> Iterator[str]:
    """A formatter with shorter lines."""
    for call in on.rollouts:
        function = on.segment(call.func)
        inside = on.segment(call)[len(function) + 1 : -1].strip().rstrip(",")
        margin = " " * (on.statement(call).col_offset + 4)
        arguments = ",\n".join(f"{margin}{on.segment(a)}" for a in call.args)
        keywords = "".join(f",\n{margin}{k.arg}={on.segment(k.value)}" for k in call.keywords)
        yield on.replace(call, f"{function}(\n{arguments}{keywords},\n{margin[4:]})") if inside else on.text


@harmless
def formatted_on_one_line(on: Host) -> Iterator[str]:
    """A formatter with longer lines."""
    for call in on.rollouts:
        yield on.replace(call, ast.unparse(call))


@harmless
def blank_lines(on: Host) -> str:
    """Blank lines before every method of the class."""
    return re.sub(r"(?m)^    def ", "\n    def ", on.text)


@harmless
def trailing_spaces_removed(on: Host) -> str:
    """Another end of the file."""
    return on.text.rstrip() + "\n\n\n"


@harmless
def local_names_renamed(on: Host) -> str:
    """Locals around the rollout get other names."""
    return (
        re.sub(r"\ball_outputs\b|\bvllm_outputs\b|(?<![\w.])outputs\b(?=( = |\]|:))", lambda m: f"{m[0]}_new", on.text)
        if on.rollouts
        else on.text
    )


@harmless
def prompts_renamed(on: Host) -> str:
    """The prompts get another name."""
    return re.sub(r"\b(vllm_prompts|vllm_inputs|all_prompts_text|prompts_for_generation)\b", r"\1_new", on.text)


@harmless
def sampling_params_renamed(on: Host) -> str | None:
    """The local name of the sampling parameters changes."""
    if not on.rollouts:
        return None
    function = on.function(on.rollouts[0])
    start, end = on.lines(function)
    return on.edit(
        ((start, end), re.sub(r"(?<![\w.\"'])sampling_params(?=( = |\)|, use))", "params", on.text[start:end]))
    )


@harmless
def more_engine_keywords(on: Host) -> str | None:
    """The engine gets one more argument."""
    if on.build is None:
        return None
    end = on.span(on.build)[1] - 1
    inside = on.text[:end].rstrip()
    comma = "" if inside.endswith((",", "(")) else ", "
    return on.edit(((end, end), f"{comma}**{{}}"))


@harmless
def more_rollout_keywords(on: Host) -> Iterator[str]:
    """The call gets one more argument."""
    for call in on.rollouts:
        end = on.span(call)[1] - 1
        comma = "" if on.text[:end].rstrip().endswith(",") else ", "
        yield on.edit(((end, end), f"{comma}priority=None"))


@harmless
def type_hints(on: Host) -> str:
    """Methods without a return type get one."""
    return re.sub(r"(?m)^(    def \w+\(self\)):$", r"\1 -> None:", on.text)


@harmless
def hint_names_the_engine_class(on: Host) -> str:
    """A new function takes an `LLM` by its annotation alone."""
    return on.with_function('def describe(engine: "LLM") -> str:\n    return str(type(engine))\n')


@harmless
def methods_moved(on: Host) -> str | None:
    """The last method moves to the front of the class."""
    if on.class_node is None:
        return None
    methods = [f for f in on.class_node.body if isinstance(f, ast.FunctionDef)]
    span, (first, _) = on.lines(methods[-1]), on.lines(methods[0])
    if len(methods) < 2:
        return None
    return on.edit((span, ""), ((first, first), on.text[span[0] : span[1]] + "\n"))


@harmless
def constructor_argument(on: Host) -> str | None:
    """The constructor takes one more argument."""
    init = on.method("__init__")
    if init is None or init.args.kwarg or init.args.vararg:
        return None
    last = (init.args.kwonlyargs or init.args.args)[-1]
    end = on.span(last)[1] if not init.args.defaults else on.span(init.args.defaults[-1])[1]
    return on.edit(((end, end), ", new_option=None"))


@harmless
def constructor_statement(on: Host) -> str | None:
    """The constructor keeps one more attribute."""
    init = on.method("__init__")
    return None if init is None else on.after(on.body(init)[-1], "self.new_option = None")


@harmless
def statement_in_front_of_the_constructor(on: Host) -> str | None:
    """The constructor starts with another statement."""
    init = on.method("__init__")
    return None if init is None else on.before(on.body(init)[0], "new_option = None")


@harmless
def statement_in_the_sync(on: Host) -> str | None:
    """The sync starts with another assignment."""
    return None if on.sync is None else on.before(on.body(on.sync)[0], "started = 0")


@harmless
def statement_at_the_end_of_the_sync(on: Host) -> str | None:
    """The sync ends with a log line."""
    return None if on.sync is None else on.after(on.sync.body[-1], 'print("synchronised")')


@harmless
def docstring_of_the_sync(on: Host) -> str | None:
    """The sync gets a docstring."""
    if on.sync is None or ast.get_docstring(on.sync):
        return None
    return on.before(on.sync.body[0], '"""Merge the adapter and push all weights with load_weights()."""')


@harmless
def one_more_caller_of_the_sync(on: Host) -> str | None:
    """A new method synchronises, too (TRL 1.16 has eleven callers)."""
    return None if on.sync is None else on.with_method(f"def _refresh(self):\n    self.{on.sync.name}()\n")


@harmless
def another_import(on: Host) -> str:
    """One more import."""
    return on.with_import("import string")


@harmless
def future_import(on: Host) -> str | None:
    """Annotations become lazy."""
    return None if "from __future__" in on.text else on.before(on.tree.body[0], "from __future__ import annotations")


@harmless
def vllm_import_in_parentheses(on: Host) -> str | None:
    """The import from vLLM is broken over lines."""
    changed = re.sub(
        r"(?m)^( *)from vllm import ([\w, ]+)$",
        lambda m: f"{m[1]}from vllm import (\n{m[1]}    {m[2].replace(', ', f',{chr(10)}{m[1]}    ')},\n{m[1]})",
        on.text,
        count=1,
    )
    return None if changed == on.text else changed


@harmless
def more_names_from_vllm(on: Host) -> str | None:
    """One more name from vLLM."""
    return re.sub(r"(?m)^( *)from vllm import LLM\b", r"\1from vllm import LLM, PoolingParams", on.text, count=1)


@harmless
def decorated_rollout(on: Host) -> str | None:
    """The method that rolls out gets a decorator."""
    return None if not on.rollouts else on.before(on.function(on.rollouts[0]), "@torch.no_grad()")


@harmless
def rollout_returns_more(on: Host) -> str | None:
    """The rollout is timed around the call."""
    if not on.rollouts:
        return None
    changed = on.before(on.statement(on.rollouts[0]), "started = 0")
    again = Host(on.release, on.path, on.cls, changed)
    return again.after(again.statement(again.rollouts[0]), "took = 1 - started")


@harmless
def profiler_renamed(on: Host) -> str:
    """The label of the profiler changes."""
    return on.text.replace('"vLLM.generate"', '"vLLM.rollout"').replace("with profiler:", "with (profiler):")


@harmless
def class_constant(on: Host) -> str:
    """A class constant is added."""
    if on.class_node is None:
        return on.with_function("NEW_CONSTANT = 1\n")
    first = next(n for n in on.class_node.body if isinstance(n, ast.FunctionDef))
    return on.before(first, 'new_constant = ("trl", "grpo")\n')


@harmless
def license_year(on: Host) -> str | None:
    """The license's year changes."""
    return on.text.replace("2020-2025", "2020-2027").replace("2020-2026", "2020-2027")
