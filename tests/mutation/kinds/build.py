"""E: the construction of the engine, and what it is assigned to."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from tests.mutation.hosts import Host, indented, rollout_hosts
from tests.mutation.mutants import kind


def building(release: str) -> Iterator[Host]:
    yield from (host for host in rollout_hosts(release) if host.build is not None)


def _build(host: Host) -> ast.Call:
    assert host.build is not None
    return host.build


def _arguments(host: Host) -> str:
    call = _build(host)
    inside = host.segment(call)[len(host.segment(call.func)) :].strip()[1:-1]
    return re.sub(r"(?m)\s*#.*$", "", inside).rstrip().rstrip(",")


def constructed(make: Callable[[Host], str]) -> Callable[[Host], str]:
    """Register a kind that puts an expression in the place of `LLM(...)`."""

    def change(host: Host) -> str:
        return host.replace(_build(host), make(host))

    change.__doc__ = make.__doc__
    kind("E", building, name=make.__name__)(change)
    return make


@constructed
def one_more_engine_argument(host: Host) -> str:
    """The engine gets one more argument (`logprobs_mode`, 0.26)."""
    return f"LLM({_arguments(host)}, enable_prefix_caching=False)"


@constructed
def lora_enabled(host: Host) -> str:
    """TRL enables LoRA by itself."""
    return f"LLM({_arguments(host)}, enable_lora=True, max_lora_rank=64)"


@constructed
def sleep_mode_always(host: Host) -> str:
    """Sleep mode is always on."""
    return f"LLM({_arguments(host).replace('enable_sleep_mode=', 'enable_sleep_mode=True or ')})"


@constructed
def model_by_position(host: Host) -> str:
    """The model is passed by position."""
    return f"LLM({_arguments(host).replace('model=model.name_or_path', 'model.name_or_path')})"


@constructed
def all_in_a_dictionary(host: Host) -> str:
    """The arguments come from a dictionary (OnlineDPO 0.23)."""
    return f"LLM(**dict({_arguments(host)}))"


@constructed
def class_chosen(host: Host) -> str:
    """The class is chosen by a setting."""
    return (
        f"(LLM if args.use_vllm else None)({_arguments(host)})"
        if "args" in _names(host)
        else f"(LLM)({_arguments(host)})"
    )


def _names(host: Host) -> set[str]:
    return {argument.arg for argument in host.function(_build(host)).args.args}


@constructed
def by_module(host: Host) -> str:
    """The class is taken from the module."""
    return f"__import__('vllm').LLM({_arguments(host)})"


@constructed
def from_engine_arguments(host: Host) -> str:
    """A class method builds it from engine arguments (vLLM 0.11 and newer)."""
    return f"LLM.from_engine_args(dict({_arguments(host)}))"


@constructed
def by_a_factory(host: Host) -> str:
    """A function of TRL builds it."""
    return f"build_llm({_arguments(host)})"


@constructed
def another_class(host: Host) -> str:
    """TRL goes over to an asynchronous engine."""
    return f"AsyncLLM({_arguments(host)})"


@constructed
def wrapped(host: Host) -> str:
    """The engine is wrapped in an object of TRL's."""
    return f"RolloutEngine(LLM({_arguments(host)}))"


@constructed
def only_one_of_two(host: Host) -> str:
    """The main process alone builds one."""
    return f"LLM({_arguments(host)}) if {host.receiver}.accelerator.is_main_process else None"


@constructed
def in_a_lambda_for_later(host: Host) -> str:
    """The engine is built lazily."""
    return f"(lambda: LLM({_arguments(host)}))()"


def placed(make: Callable[[Host, ast.stmt, str], str]) -> Callable[[Host, ast.stmt, str], str]:
    """Register a kind that puts statements in the place of the one that builds the engine; it gets its text."""

    def change(host: Host) -> str:
        statement = host.statement(_build(host))
        text = re.sub(rf"(?m)^ {{{statement.col_offset}}}", "", host.segment(statement))
        return host.edit((host.lines(statement), indented(make(host, statement, text), statement.col_offset)))

    change.__doc__ = make.__doc__
    kind("E", building, name=make.__name__)(change)
    return make


def _inside(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


@placed
def local_name_first(host: Host, statement: ast.stmt, text: str) -> str:
    """The engine gets a local name before it becomes an attribute."""
    engine = host.segment(statement.targets[0])  # type: ignore[attr-defined]
    return f"{text.replace(engine, 'engine', 1)}\n{engine} = engine"


@placed
def two_attributes(host: Host, statement: ast.stmt, text: str) -> str:
    """The engine is kept under two names."""
    return f"{host.receiver}.rollout_engine = {text}"


@placed
def annotated(host: Host, statement: ast.stmt, text: str) -> str:
    """The attribute gets a type."""
    engine = host.segment(statement.targets[0])  # type: ignore[attr-defined]
    return text.replace(f"{engine} =", f"{engine}: object =", 1)


@placed
def in_a_condition(host: Host, statement: ast.stmt, text: str) -> str:
    """The engine is built unless there is one."""
    return f"if {host.receiver}.use_vllm:\n{_inside(text)}"


@placed
def in_a_try_with_fallback(host: Host, statement: ast.stmt, text: str) -> str:
    """A second try with less memory."""
    return f"try:\n{_inside(text)}\nexcept ValueError:\n{_inside(text)}"


@placed
def in_a_context(host: Host, statement: ast.stmt, text: str) -> str:
    """The engine is built within a context (environment variables of the ranks)."""
    return f"with nullcontext():\n{_inside(text)}"


@placed
def a_second_engine(host: Host, statement: ast.stmt, text: str) -> str:
    """A teacher gets an engine of its own."""
    engine = host.segment(statement.targets[0])  # type: ignore[attr-defined]
    return f"{text}\n{text.replace(engine, f'{host.receiver}.teacher_llm', 1)}"


@placed
def an_attribute_of_another_name(host: Host, statement: ast.stmt, text: str) -> str:
    """The attribute has another name; the old one is a property."""
    return text.replace(f"{host.receiver}.{host.attribute} =", f"{host.receiver}._{host.attribute} =", 1)


@placed
def moved_to_a_local_function(host: Host, statement: ast.stmt, text: str) -> str:
    """A local function builds it."""
    engine = host.segment(statement.targets[0])  # type: ignore[attr-defined]
    return f"def build():\n{_inside(text.replace(f'{engine} =', 'return', 1))}\n\n{engine} = build()"


@kind("E", building)
def class_imported_under_another_name(host: Host) -> str:
    """The class is imported under another name."""
    renamed = re.sub(r"(from vllm import .*)\bLLM\b", r"\1LLM as VLLM", host.text, count=1)
    return re.sub(r"(?<![\w.])LLM\(", "VLLM(", renamed)


@kind("E", building)
def moved_to_another_method(host: Host) -> str:
    """The construction moves to a method of its own, as `_init_vllm` did in 0.28."""
    statement = host.statement(_build(host))
    start, end = host.lines(statement)
    used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    function = host.function(statement)
    local = _names(host) | {
        n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    parameters = ["model", *sorted(used & local - {"model", "self"})]
    call = f"self._build_engine({', '.join(parameters)})"
    moved = host.edit(((start, end), indented(call, statement.col_offset)))
    body = indented(host.text[start:end], 4)
    return Host(host.release, host.path, host.cls, moved).with_method(
        f"def _build_engine(self, {', '.join(parameters)}):\n{body}"
    )


@kind("E", building, former_survivor=True)
def model_under_another_name(host: Host) -> str:
    """A method builds it from the name alone, and binds `model` only in a lambda."""
    statement = host.statement(_build(host))
    start, end = host.lines(statement)
    moved = host.edit(
        ((start, end), indented(f"self.{host.attribute} = self._build_engine('m')", statement.col_offset))
    )
    return Host(host.release, host.path, host.cls, moved).with_method(
        "def _build_engine(self, name, **kwargs):\n"
        "    short = (lambda model: model)(name)\n"
        "    self.short = short\n"
        "    return LLM(model=name, **kwargs)\n"
    )


@kind("E", building)
def parameter_renamed(host: Host) -> str:
    """The constructor's `model` gets another name there."""
    start, end = host.lines(host.function(_build(host)))
    return host.edit(((start, end), re.sub(r"(?<![\w.\"'])model\b(?!=)", "policy", host.text[start:end])))


@kind("E", building)
def removed_altogether(host: Host) -> str:
    """The engine is built somewhere else."""
    return host.edit(
        (host.lines(host.statement(_build(host))), indented("pass", host.statement(_build(host)).col_offset))
    )


@kind("E", building)
def a_second_one_in_a_method(host: Host) -> str:
    """A new method builds an engine for evaluation."""
    return host.with_method("def _evaluation_engine(self, model):\n    return LLM(model=model.name_or_path)\n")


@kind("E", building, former_survivor=True)
def a_second_one_in_a_function(host: Host) -> str:
    """A new function of the file builds an engine."""
    return host.with_function("def evaluation_engine(model):\n    return LLM(model=model.name_or_path)\n")


@kind("E", building, former_survivor=True)
def a_second_one_of_another_class(host: Host) -> str:
    """A new method builds an asynchronous engine."""
    return host.with_method(
        "def _evaluation_engine(self, model):\n    from vllm import AsyncLLM\n\n    return AsyncLLM(model)\n"
    )
