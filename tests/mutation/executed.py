"""Executed oracle: run the patched file against stub imports and a recording engine, and judge what the engine saw.

Independent of trlpatch: it knows what the hooks promise, and nothing of how a rewrite is made. Every function that
touches an engine is called, conversational and not, with sleep mode and without, the adapter handed over and not.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import functools
import inspect
import io
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

from tests.mutation.hosts import ENGINES, SYNCS, parsed
from tests.mutation.stub_imports import Event, Recorder, StubHooks, StubObject, _is_engine, importer

REQUESTS = frozenset({
    "generate", "chat", "beam_search", "encode", "embed", "classify", "score", "reward", "add_request",
    "_run_completion", "_add_request", "enqueue", "generate_async", "enqueue_chat",
    "_validate_and_add_requests", "_run_engine", "step",
})  # fmt: skip
PUSHES = frozenset({
    "load_weights", "apply_model", "update_weights", "update_named_param", "load_state_dict",
    "init_weights_update_group", "copy_", "start_weight_update", "finish_weight_update",
})  # fmt: skip
MEMORY = frozenset({"sleep", "wake_up"})
READS = frozenset({
    "reset_prefix_cache", "get_tokenizer", "get_default_sampling_params", "reset_mm_cache", "get_metrics",
    "is_sleeping",
})  # fmt: skip
RELOADS = "reload_weights"
TOUCHING = frozenset({*ENGINES, *SYNCS, "LLM", "_trlpatch", "load_weights", "collective_rpc", "apply_model"})

CONDITIONS = (
    {"conversational": False, "sleeps": True, "handed_over": True},
    {"conversational": True, "sleeps": True, "handed_over": False},
    {"conversational": False, "sleeps": False, "handed_over": False},
)
SECONDS = 3.0


class TooLong(Exception):
    """A call went round in circles among stubs."""


@dataclass
class Verdict:
    """What an execution showed: faults seen, and the hook calls of the text that no run reached."""

    wrong: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)


def judge(patched: str, mutant: str, upstream: str) -> Verdict:
    """Judge `patched`, the rewrite of `mutant`, which was made from `upstream`."""
    verdict = Verdict()
    known = _qualnames(upstream)
    lines: set[int] = set()
    for condition in CONDITIONS:
        try:
            ours = _Run(patched, known, condition)
            stock = _Run(mutant, known, condition)
        except SyntaxError:
            raise
        except Exception as error:
            verdict.unreached.append(f"the module cannot be executed: {type(error).__name__}: {error}")
            return verdict
        for name in ours.entries:
            events = ours.call(name)
            lines.update(event.line for event in events)
            verdict.wrong += [f"{name}: {fault}" for fault in faults(events, ours.recorder, ours.hooks)]
            if not condition["handed_over"] and name in stock.entries and not ours.errors.get(name):
                verdict.wrong += [f"{name}: {fault}" for fault in changed(events, stock.call(name))]
    verdict.unreached += [
        f"line {node.lineno}: {ast.unparse(node.func)} was not reached"
        for node in hook_calls(patched)
        if not lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    ]
    verdict.wrong = list(dict.fromkeys(verdict.wrong))
    return verdict


def pushes(patched: str) -> dict[str, int]:
    """Return how often each sync method pushes where the adapter is not handed over: never would prove nothing."""
    run = _Run(patched, frozenset(), CONDITIONS[-1])
    names = [name for name in run.entries if name.rpartition(".")[2] in SYNCS]
    return {name: _sequence(run.call(name)).count("push") for name in names}


def faults(events: list[Event], recorder: Recorder, hooks: StubHooks) -> Iterator[str]:
    """Yield what must not happen to an engine in one run of one function."""
    merged = asked = 0
    for event in events:
        last = event.what.rpartition(".")[2]
        rpc = str(event.arguments[0]) if last == "collective_rpc" and event.arguments else ""
        if event.what.startswith("hook."):
            if merged > 0 and event.what in {"hook.hand_over", "hook.lora_request"}:
                yield f"{event.what} while the adapter is merged into the weights"
            if event.what in {"hook.lora_request", "hook.sleep", "hook.wake_up"} and not _is_engine(
                event.arguments[1]
            ):
                yield f"{event.what} is given something else than the engine"
            asked += event.what == "hook.hand_over"
        elif event.what in {"merge_adapter", "unmerge_adapter"}:
            merged += 1 if event.what == "merge_adapter" else -1
        elif event.what.startswith("<"):
            yield f"the engine is {event.what.strip('<>')}: {event.arguments}"
        elif last in REQUESTS:
            if event.keywords.get("lora_request") is not hooks.live:
                yield f"{event.what} without the live adapter"
        elif last in MEMORY or last == RELOADS or rpc == RELOADS:
            yield f"{event.what} {rpc} past the hooks"
        elif last in PUSHES or rpc:
            if recorder.handed_over or not asked:
                yield f"{event.what} {rpc} pushes weights " + ("after" if asked else "without") + " a hand-over"
        elif last not in READS:
            yield f"{event.what}: nothing is known of this call"


def changed(ours: list[Event], stock: list[Event]) -> Iterator[str]:
    """Yield a difference between what the patched and the unpatched text do to an engine whose sync must push.

    A sleep may be added right behind a rollout: trainers that have no sleep code of their own get one.
    """
    now, before = _sequence(ours), _sequence(stock)
    without, position = [], 0
    for what in now:
        added = what == "sleep" and before[position : position + 1] != ["sleep"]
        if added and without[-1:] == ["generate"]:
            continue
        without.append(what)
        position += 1
    if without != before:
        yield f"the engine sees {without}, unpatched {before}"


def _sequence(events: list[Event]) -> list[str]:
    found = []
    for event in events:
        last = event.what.rpartition(".")[2]
        rpc = str(event.arguments[0]) if last == "collective_rpc" and event.arguments else ""
        if last in REQUESTS:
            found.append("generate")
        elif last in MEMORY:
            found.append(last)
        elif rpc == RELOADS or last == RELOADS:
            found.append(RELOADS)
        elif last in PUSHES or rpc:
            found.append("push")
    return found


def hook_calls(text: str) -> list[ast.Call]:
    """Return the calls of hooks that decide over the engine."""
    names = {f"_trlpatch.{name}" for name in ("lora_request", "hand_over", "sleep", "wake_up", "reload_weights")}
    if "_trlpatch." not in text:
        return []
    calls = (node for node in ast.walk(parsed(text)) if isinstance(node, ast.Call))
    return [node for node in calls if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in names]


class _Run:
    """One execution of a file's module level, and the functions in it to call."""

    def __init__(self, text: str, known: frozenset[str], condition: dict[str, bool]) -> None:
        self.recorder = Recorder(**condition)
        self.hooks = StubHooks(self.recorder)
        self.errors: dict[str, str] = {}
        namespace = {
            "__name__": "stub_module",
            "__builtins__": {**vars(builtins), "__import__": importer(self.recorder, self.hooks)},
            "__file__": "stub_module.py",
        }
        with time_limit(), warnings.catch_warnings(action="ignore"):
            exec(_compiled(text), namespace)
        self.entries = dict(self._entries(namespace, known))

    def _entries(
        self, namespace: dict[str, Any], known: frozenset[str]
    ) -> Iterator[tuple[str, tuple[Any, FunctionType]]]:
        every = list(_functions(namespace))
        synced = [f.__code__ for _, _, f in every if f.__name__ in SYNCS]
        helpers = _called_from(synced, {f.__name__: f.__code__ for _, _, f in every})
        others = (_names(f.__code__) for _, _, f in every if f.__name__ not in helpers and f.__name__ not in SYNCS)
        helpers -= set().union(*others)
        for name, owner, function in every:
            private = function.__name__ in helpers  # runs behind the sync's own hand-over, never by itself
            if not private and (name not in known or _names(function.__code__) & TOUCHING):
                yield name, (owner, function)

    def call(self, name: str) -> list[Event]:
        """Call one function with stubs and return what happened; an exception ends it and is kept in `errors`."""
        owner, function = self.entries[name]
        self.recorder.events = []
        try:
            with time_limit(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
                _call(self.recorder, owner, function)
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {error}"
        return self.recorder.events


@functools.lru_cache(maxsize=4)
def _compiled(text: str) -> CodeType:
    return compile(_with_builders(text), "stub_module.py", "exec", dont_inherit=True)


def _with_builders(text: str) -> ast.Module:
    """Parse `text`; a constructor that builds an engine also stands there as `_build`, with that statement alone.

    What comes before it in a trainer (datasets, models, rewards) needs real ones.
    """
    tree = ast.Module([_copied(node) for node in parsed(text).body], [])
    lines, search = text.splitlines(keepends=True), re.compile(rf"\b({'|'.join(ENGINES)}|LLM)\b").search
    for node in tree.body:
        methods = [m for m in getattr(node, "body", ()) if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
        for method in methods if isinstance(node, ast.ClassDef) else ():
            building = [s for s in method.body if search("".join(lines[s.lineno - 1 : s.end_lineno])) and _builds(s)]
            if building:
                inside = {n.id for s in building for n in ast.walk(s) if isinstance(n, ast.Name)}
                assigned = {n.id for s in building for n in ast.walk(s) if isinstance(n, ast.Name) and not _loads(n)}
                given = {a.arg for a in ast.walk(method.args) if isinstance(a, ast.arg)}
                local = {n.id for s in method.body for n in ast.walk(s) if isinstance(n, ast.Name) and not _loads(n)}
                names = sorted(inside & (given | local) - assigned - {"self"})
                arguments = ast.arguments([], [ast.arg(name) for name in ["self", *names]], None, [], [], None, [])
                added = ast.FunctionDef("_build", arguments, building, [], None, None, lineno=1)
                node.body.append(ast.fix_missing_locations(ast.copy_location(added, method)))
    return tree


def _copied(node: ast.stmt) -> ast.stmt:
    """Return a class whose body can be added to; parsed texts are shared."""
    if not isinstance(node, ast.ClassDef):
        return node
    changed = copy.copy(node)
    changed.body = list(node.body)
    return changed


def _loads(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _builds(statement: ast.stmt) -> bool:
    names = (n for n in ast.walk(statement) if isinstance(n, (ast.Name, ast.Attribute)))
    return any((n.id if isinstance(n, ast.Name) else n.attr) in {*ENGINES, "LLM"} for n in names)


def _functions(namespace: dict[str, Any]) -> Iterator[tuple[str, Any, FunctionType]]:
    """Yield name, owner and function of everything that the module defines: functions, methods, lambdas."""
    seen: set[int] = set()
    pending = [("", None, dict(namespace))]
    while pending:
        prefix, owner, members = pending.pop(0)
        for key, value in members.items():
            found = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
            while not isinstance(found, FunctionType) and isinstance(getattr(found, "func", None), FunctionType):
                found = found.func
            found = inspect.unwrap(found) if isinstance(found, FunctionType) else found
            if isinstance(found, FunctionType) and found.__module__ == "stub_module" and id(found) not in seen:
                seen.add(id(found))
                yield f"{prefix}{key}", None if isinstance(value, staticmethod) else owner, found
            elif isinstance(value, type) and value.__module__ == "stub_module" and id(value) not in seen:
                seen.add(id(value))
                pending.append((f"{prefix}{key}.", value, dict(vars(value))))


def _called_from(codes: list[CodeType], functions: dict[str, CodeType]) -> set[str]:
    reached: set[str] = set()
    pending = list(codes)
    while pending:
        for name in _names(pending.pop()) & functions.keys() - reached - set(SYNCS):
            reached.add(name)
            pending.append(functions[name])
    return reached


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    texts = {constant for constant in code.co_consts if isinstance(constant, str) and constant in TOUCHING}
    return {*code.co_names, *texts}.union(*(_names(each) for each in inner))


def _call(recorder: Recorder, owner: type | None, function: FunctionType) -> None:
    arguments: list[Any] = []
    named: dict[str, Any] = {}
    for index, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            continue
        if index == 0 and owner is not None:
            value: Any = _instance(recorder, owner)
        elif parameter.default is not parameter.empty and parameter.name not in {"model", "args"}:
            continue
        else:
            value = recorder.setting(parameter.name)
            value = StubObject(recorder, parameter.name) if value is ... else value
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = value
        else:
            arguments.append(value)
    result = function(*arguments, **named)
    if inspect.iscoroutine(result):
        with contextlib.suppress(StopIteration):
            while True:
                result.send(None)
    elif inspect.isgenerator(result):
        list(zip(range(20), result, strict=False))
    elif isinstance(result, FunctionType) and result.__module__ == "stub_module":
        _call(recorder, None, result)


def _instance(recorder: Recorder, owner: type) -> Any:
    instance = owner.__new__(owner)
    if isinstance(getattr(type(instance), "_is_stub", None), bool):
        return instance  # inherits what answers everything
    known = {name: recorder.setting(name) for name in ("mode", "enable_sleep_mode", "llm", "vllm_engine", "vllm_mode")}
    for name, value in known.items():
        with contextlib.suppress(AttributeError):
            setattr(instance, name, value)
    kind = type(owner.__name__, (owner,), {"__getattr__": lambda self, name: _missing(recorder, name)})
    with contextlib.suppress(TypeError):
        instance.__class__ = kind
    return instance


def _missing(recorder: Recorder, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    value = recorder.setting(name)
    return StubObject(recorder, name) if value is ... else value


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise TooLong after some seconds of CPU time."""

    def stop(*_: object) -> None:
        raise TooLong

    previous: Callable[..., Any] | int | None = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@functools.lru_cache(maxsize=32)
def _qualnames(text: str) -> frozenset[str]:
    def inside(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from inside(node.body, f"{prefix}{node.name}.")

    return frozenset(inside(ast.parse(text).body, ""))
