"""Config oracle: a patched config dataclass is built, and names that hooks set on arguments are still fields.

Stock TRL and the hooks meet in the names of a config's fields; a field that is renamed everywhere leaves the
hooks with names that set nothing.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
from collections.abc import Iterator

from tests.mutation import hosts
from tests.mutation.stub_imports import Recorder, StubHooks, importer

SET_BY_HOOKS = ("use_vllm", "vllm_mode", "vllm_enable_sleep_mode")
"""Fields that `configure` sets for an attached engine, each where a release has it."""

FIELD = "vllm_sampling_params"


def judge(text: str) -> Iterator[str]:
    """Yield what is wrong with a patched config: it cannot be made, or takes no sampling parameters."""
    recorder = Recorder()
    hooks = StubHooks(recorder)
    normalized: list[object] = []
    hooks.__dict__["normalize_sampling"] = normalized.append
    namespace = {
        "__name__": "stub_module",
        "__builtins__": {**vars(builtins), "__import__": importer(recorder, hooks)},
    }
    try:
        exec(compile(text, "stub_module.py", "exec", dont_inherit=True), namespace)
    except Exception as error:
        yield f"the config cannot be imported: {type(error).__name__}: {error}"
        return
    configs = [
        v for k, v in namespace.items() if k.endswith("Config") and getattr(v, "__module__", "") == "stub_module"
    ]
    for config in configs:
        fields = list(getattr(config, "__dataclass_fields__", {}))
        if FIELD not in fields:
            yield f"{config.__name__} has no field {FIELD}"
        elif "__post_init__" in vars(config):
            instance = config.__new__(config)
            for name in fields:
                vars(instance)[name] = getattr(config, name, None)
            with contextlib.suppress(Exception):  # it needs transformers' own; the hook stands at its head
                config.__post_init__(instance)
            if not any(given is instance for given in normalized):
                yield f"{config.__name__}.__post_init__ does not normalise {FIELD}"


def across(release: str, files: dict[str, str | None]) -> Iterator[str]:
    """Yield the fields that hooks set and that a changed config no longer has."""
    for path, text in files.items():
        if not path.endswith("_config.py") or text is None or not (hosts.tree_of(release) / path).is_file():
            continue
        before, now = _fields(hosts.read(release, path)), _fields(text)
        for name in SET_BY_HOOKS:
            if name in before and name not in now:
                yield f"hooks set {name}, which {path} no longer has"


def _fields(text: str) -> set[str]:
    annotated = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.AnnAssign))
    return {node.target.id for node in annotated if isinstance(node.target, ast.Name)}
