"""Stubs of everything that TRL imports, and an engine that records: TRL's code runs without torch, vLLM and a model.

`StubObject` answers everything with more of itself. `RecordingEngine` notes every call with its path. Conditions that
decide whether the engine is used (`SETTINGS`) have real values. Nothing here is trlpatch's.
"""

from __future__ import annotations

import builtins
import dis
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType, MethodType
from typing import Any

REAL = frozenset({
    "__future__", "abc", "ast", "asyncio", "collections", "contextlib", "copy", "dataclasses", "enum",
    "functools", "inspect", "itertools", "json", "logging", "math", "operator", "string", "sys", "textwrap",
    "types", "typing", "typing_extensions", "warnings", "weakref",
})  # fmt: skip
"""Modules that are imported as they are: none that waits, starts a thread or touches a file."""

BUILDERS = frozenset({"LLM", "AsyncLLM", "LLMEngine", "AsyncLLMEngine"})

INHERITED = [
    "_prepare_inputs",
    "_save_checkpoint",
    "compute_loss",
    "log",
    "training_step",
    "prediction_step",
    "evaluate",
    "train",
    "save_model",
    "_inner_training_loop",
    "on_step_end",
    "on_train_begin",
    "create_optimizer",
    "__post_init__",
]
"""Methods that TRL calls on `super()`, which asks no `__getattr__`."""

SETTINGS: dict[str, Any] = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "mode": "colocate",
    "vllm_tensor_parallel_size": 1,
    "tensor_parallel_size": 1,
    "vllm_model_impl": "vllm",
    "num_processes": 1,
    "process_index": 0,
    "is_fsdp": False,
    "is_fsdp_enabled": False,
    "is_deepspeed_enabled": False,
    "use_transformers_paged": False,
    "deepspeed_plugin": None,
    "rollout_func": None,
    "guided_decoding_regex": None,
    "structured_outputs_regex": None,
    "vllm_guided_decoding_regex": None,
    "n": 1,
    "tools": None,
    "environments": None,
    "environment_factory": None,
    "_is_vlm": False,
    "is_vision_model": False,
    "use_liger_loss": False,
    "use_liger_kernel": False,
    "_last_loaded_step": -1,
    "_llm_weights_sleeping": True,
    "__version__": "9.9.9",
}


@dataclass
class Event:
    """What happened to the engine: a call on it, a hook, a merge of the adapter, or the engine given away."""

    what: str
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    line: int = 0


@dataclass
class Recorder:
    """The events of one run, and what its conditions are."""

    conversational: bool = False
    sleeps: bool = True
    handed_over: bool = True
    events: list[Event] = field(default_factory=list)

    @cached_property
    def engine(self) -> RecordingEngine:
        return RecordingEngine(self)

    def note(self, what: str, *arguments: Any, line: int = 0, **keywords: Any) -> None:
        self.events.append(Event(what, arguments, keywords, line))

    def setting(self, name: str) -> Any:
        if name in {"llm", "vllm_engine"}:
            return self.engine
        if "sleep_mode" in name:
            return self.sleeps
        if name == "is_conversational":
            return lambda *_, **__: self.conversational
        if name.startswith("is_") and name.endswith("_available"):
            return lambda *_, **__: name == "is_vllm_available"
        if name == "is_peft_model":
            return lambda *_, **__: True
        return SETTINGS.get(name, ...)


class RecordingEngine:
    """An engine, or what hangs on one: every call under it is an event with its dotted path."""

    def __init__(self, recorder: Recorder, path: str = "") -> None:
        self.__dict__.update(_recorder=recorder, _path=path)

    def __getattr__(self, name: str) -> RecordingEngine:
        if name.startswith("__"):
            raise AttributeError(name)
        return RecordingEngine(self._recorder, f"{self._path}.{name}".lstrip("."))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self._recorder.note(self._path or "<engine>", *arguments, **keywords)
        return StubObject(self._recorder, "outputs")

    def __lt__(self, other: object) -> bool:
        return False

    __gt__ = __le__ = __ge__ = __lt__

    def __reduce_ex__(self, protocol: object) -> Any:
        return RecordingEngine, (self._recorder, self._path)


def _is_engine(value: object) -> bool:
    if isinstance(value, MethodType):
        value = value.__self__
    if isinstance(value, (tuple, list)):
        return any(_is_engine(v) for v in value)
    # What is read of it (a length in its configuration) is not the engine.
    return isinstance(value, RecordingEngine) and "config" not in value._path


class StubObject:
    """Whatever TRL imports or is given. True, one element long, equal to itself alone."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.__dict__.update(_recorder=recorder, _name=name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name != "__version__":
            raise AttributeError(name)
        value = self._recorder.setting(name)
        if value is ...:
            value = self.__dict__[name] = stub(self._recorder, name)
        return value

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if len(arguments) == 1 and not keywords and isinstance(arguments[0], (FunctionType, type)):
            return arguments[0]  # as a decorator
        given = [*arguments, *keywords.values()]
        if any(_is_engine(value) for value in given):
            self._recorder.note("<given away>", self._name)
        if self._name in {"merge_adapter", "unmerge_adapter"}:
            self._recorder.note(self._name)
        return StubObject(self._recorder, self._name)

    def __iter__(self) -> Iterator[Any]:
        if self._name == "keys":
            return iter(())  # as `**keywords`
        frame = sys._getframe(1)
        code, at = frame.f_code.co_code, frame.f_lasti
        wanted = code[at + 1] if code[at] == dis.opmap["UNPACK_SEQUENCE"] else 1
        return iter([StubObject(self._recorder, "item") for _ in range(wanted)])

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> bool:
        return False

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> bool:
        return False

    def __await__(self) -> Iterator[Any]:
        return iter(())

    def __getitem__(self, key: object) -> Any:
        return StubObject(self._recorder, "item")

    def __setitem__(self, key: object, value: object) -> None:
        if _is_engine(value):
            self._recorder.note("<given away>", self._name)

    def __len__(self) -> int:
        return 1

    def __bool__(self) -> bool:
        return True

    def __contains__(self, item: object) -> bool:
        return False

    def __int__(self) -> int:
        return 1

    __index__ = __int__

    def __float__(self) -> float:
        return 1.0

    def __str__(self) -> str:
        return self._name

    def __format__(self, spec: str) -> str:
        return self._name

    def __lt__(self, other: object) -> bool:
        return False

    __gt__ = __le__ = __ge__ = __lt__

    def _same(self, *_: object) -> Any:
        return StubObject(self._recorder, self._name)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __and__ = __or__ = (
        _same
    )
    __rand__ = __ror__ = __neg__ = __invert__ = __pow__ = __rpow__ = __matmul__ = __iadd__ = __isub__ = __ior__ = _same

    def __mod__(self, other: object) -> int:
        return 0

    def __floordiv__(self, other: object) -> int:
        return 1

    __rmod__ = __mod__
    __rfloordiv__ = __floordiv__


def _inherited(self: Any, *_: Any, **__: Any) -> Any:
    return StubObject(self._recorder, "inherited")


class StubClass(type):
    """The metaclass of stub classes: any attribute, and nothing is an instance of one."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stub(cls._recorder, name)

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        if cls.__dict__.get("_is_stub") and cls.__name__ in BUILDERS:
            cls._recorder.note("<built past the hook>", cls.__name__)
            return cls._recorder.engine
        return super().__call__(*arguments, **keywords)

    def __instancecheck__(cls, instance: object) -> bool:
        return False if cls.__dict__.get("_is_stub") else type.__instancecheck__(cls, instance)

    def __getitem__(cls, key: object) -> Any:
        return cls

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__


def stub(recorder: Recorder, name: str) -> Any:
    """Return a stub class for a name in CamelCase, else a stub object."""
    if not name.lstrip("_")[:1].isupper() or (name.isupper() and name not in BUILDERS):
        return StubObject(recorder, name)

    def answer(self: Any, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return StubObject.__getattr__(self, attribute)

    def build(self: Any, *arguments: Any, **keywords: Any) -> None:
        if any(_is_engine(value) for value in [*arguments, *keywords.values()]):
            recorder.note("<given away>", name)

    bodies = {key: value for key, value in vars(StubObject).items() if key not in {"__dict__", "__weakref__"}}
    inherited = dict.fromkeys(INHERITED, _inherited)
    namespace = {
        **bodies, **inherited, "_recorder": recorder, "_name": name, "_is_stub": True,
        "__init__": build, "__getattr__": answer, "__module__": "stub", "__hash__": object.__hash__,
    }  # fmt: skip
    return StubClass(name, (), namespace)


class StubHooks:
    """The hooks that patched text calls, as their contract says; the real ones need torch and vLLM."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.live = object()

    def _note(self, what: str, *arguments: Any) -> None:
        self._recorder.note(f"hook.{what}", *arguments, line=sys._getframe(2).f_lineno)

    def lora_request(self, owner: object, engine: object, given: object = None) -> object:
        self._note("lora_request", owner, engine)
        return self.live if given is None else given

    def hand_over(self, owner: object) -> bool:
        self._note("hand_over", owner)
        return self._recorder.handed_over

    def sleep(self, owner: object, engine: object, level: int | None = None) -> None:
        self._note("sleep", owner, engine)

    def wake_up(self, owner: object, engine: object, tags: object = None) -> None:
        self._note("wake_up", owner, engine)

    def reload_weights(self, owner: object, engine: object, **_: object) -> None:
        self._note("reload_weights", owner, engine)

    def engine(self, owner: object, model: object, llm: object) -> Callable[..., Any]:
        self._note("engine", owner, model, llm)
        return lambda *_, **__: self._recorder.engine

    def sampling_params(self, owner: object, build: object) -> Callable[..., Any]:
        return lambda *_, **__: StubObject(self._recorder, "sampling_params")

    def generation(self, args: object, build: object) -> Callable[..., Any]:
        return lambda *_, **__: StubObject(self._recorder, "vllm_generation")

    def guided_decoding_field(self, *_: object) -> str:
        return "guided_decoding"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **_: arguments[-1] if arguments else None


def importer(recorder: Recorder, hooks: StubHooks) -> Callable[..., Any]:
    """Return an `__import__` that knows the standard library, the stub hooks, and stubs for the rest."""

    def stub_import(name: str, globals_: Any = None, locals_: Any = None, names: Any = (), level: int = 0) -> Any:
        if level == 0 and name.partition(".")[0] in REAL:
            return builtins.__import__(name, globals_, locals_, names, level)
        module = StubObject(recorder, name or "package")
        if name.startswith("trlpatch"):
            module.__dict__["hooks"] = hooks
        return module

    return stub_import
