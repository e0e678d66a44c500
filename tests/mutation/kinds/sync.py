"""S: the weight sync, split, renamed, moved, or joined by a second one."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from tests.mutation.hosts import Host, indented, rollout_hosts
from tests.mutation.mutants import Change, kind

WORKER_MODEL = "llm_engine.model_executor.driver_worker.model_runner.model"


def syncing(release: str) -> Iterator[Host]:
    yield from (host for host in rollout_hosts(release) if host.sync is not None)


def survivor(make: Callable[[Host], Change | Iterator[Change]]) -> Callable[[Host], Change | Iterator[Change]]:
    kind("S", syncing, former_survivor=True)(make)
    return make


def _sync(host: Host) -> ast.FunctionDef:
    assert host.sync is not None
    return host.sync


def _push(host: Host) -> str:
    return f"{host.engine}.{WORKER_MODEL}.load_weights(self.model.state_dict().items())"


def _rollout_statement(host: Host) -> ast.stmt:
    return host.statement(host.rollouts[0])


def _sync_text(host: Host) -> str:
    start, end = host.lines(_sync(host))
    return host.text[start:end]


@survivor
def second_push_inline(host: Host) -> Iterator[str]:
    """A push of all weights right before the rollout (OnlineDPO below 0.23)."""
    yield host.before(_rollout_statement(host), _push(host))
    yield host.before(
        _rollout_statement(host), f"llm_model = {host.engine}.{WORKER_MODEL}\nllm_model.load_weights([])"
    )


@survivor
def second_push_method(host: Host) -> str:
    """A second method pushes, for the embeddings alone for instance."""
    return host.with_method(f"def _push_embeddings(self):\n    {_push(host)}\n")


@survivor
def second_push_method_called(host: Host) -> str:
    """The same, called before each rollout."""
    added = host.before(_rollout_statement(host), "self._push_embeddings()")
    return Host(host.release, host.path, host.cls, added).with_method(
        f"def _push_embeddings(self):\n    {_push(host)}\n"
    )


def _other_push(name: str, call: str, why: str) -> None:
    def inline(host: Host) -> Iterator[str]:
        code = call.format(engine=host.engine)
        yield host.before(_rollout_statement(host), code)
        yield host.with_method(f"def _push_all(self):\n{indented(code, 4)}")

    inline.__doc__ = why
    kind("S", syncing, former_survivor=True, name=name)(inline)


_other_push(
    "push_by_collective_rpc", '{engine}.collective_rpc("load_weights", args=([],))', "The workers load weights."
)
_other_push(
    "push_by_rpc_of_another_name",
    '{engine}.collective_rpc("update_named_param", args=("w",))',
    "By a worker extension.",
)
_other_push(
    "push_by_apply_model", "{engine}.apply_model(lambda model: model.load_weights([]))", "LLM.apply_model pushes."
)
_other_push("push_by_update_weights", "{engine}.update_weights([])", "vLLM's own weight transfer (0.16 and newer).")
_other_push(
    "push_by_weight_transfer", '{engine}.llm_engine.collective_rpc("update_weights", kwargs={{}})', "The same below."
)
_other_push("push_by_state_dict", "{engine}." + WORKER_MODEL + ".load_state_dict({{}})", "torch's own loading.")
_other_push(
    "push_by_copy", "{engine}." + WORKER_MODEL + ".lm_head.weight.data.copy_(self.model.lm_head.weight)", "One layer."
)
_other_push(
    "push_through_alias",
    "runner = {engine}.llm_engine.model_executor.driver_worker.model_runner\nrunner.model.load_weights([])",
    "Through an alias of the runner.",
)
_other_push(
    "push_by_new_path",
    "{engine}.llm_engine.engine_core.engine_core.model_executor.load_weights([])",
    "vLLM V1's path.",
)


@survivor
def renamed_with_a_wrapper(host: Host) -> str:
    """The sync gets a new name, the old one stays as a wrapper, and callers use the new one."""
    sync = _sync(host)
    renamed = re.sub(rf"\b{sync.name}\b", "push_weights", host.text)
    return Host(host.release, host.path, host.cls, renamed).with_method(
        f"def {sync.name}(self):\n    return self.push_weights()\n"
    )


@survivor
def callers_call_the_inner_one(host: Host) -> str:
    """The body moves to `_inner_sync`, the sync calls it, and so do the callers."""
    sync = _sync(host)
    inner = re.sub(rf"\b{sync.name}\b", "_inner_sync", host.text)
    return Host(host.release, host.path, host.cls, inner).with_method(
        f"def {sync.name}(self):\n    self._inner_sync()\n    self._synced = True\n"
    )


@survivor
def callers_of_other_files_call_the_inner_one(host: Host) -> dict[str, str | None] | None:
    """The body moves to `_push_all`; the sync calls it, and a trainer of another file does, too."""
    from tests.mutation.hosts import standing_hosts

    others = [other for other in standing_hosts(host.release) if ".sync_weights(" in other.text]
    if host.cls != "VLLMGeneration" or not others:
        return None
    body = host.text.replace("def sync_weights(", "def _push_all(")
    wrapped = Host(host.release, host.path, host.cls, body).with_method(
        "def sync_weights(self):\n    self._push_all()\n"
    )
    return {host.path: wrapped, others[0].path: others[0].text.replace(".sync_weights(", "._push_all(")}


@survivor
def split_with_a_second_caller(host: Host) -> str:
    """The push moves to a helper that the rollout calls by itself when the engine lost its weights."""
    sync = _sync(host)
    body = host.body(sync)
    start, end = host.lines(body[0])[0], host.lines(body[-1])[1]
    moved = host.edit(((start, end), indented("self._push_everything()", body[0].col_offset)))
    helper = f"def _push_everything(self):\n{indented(host.text[start:end], 4)}"
    with_helper = Host(host.release, host.path, host.cls, moved).with_method(helper)
    again = Host(host.release, host.path, host.cls, with_helper)
    return again.before(_rollout_statement(again), "self._push_everything()")


def _wake(host: Host, tags: str) -> str:
    return f"if self.mode == 'x' or True:\n    {host.engine}.wake_up(tags=[{tags}])"


@survivor
def wake_of_kv_at_the_end(host: Host) -> str:
    """The sync wakes the KV cache when it is done."""
    return host.after(_sync(host).body[-1], _wake(host, "'kv_cache'"))


@survivor
def wake_of_weights_at_the_end(host: Host) -> str:
    """The sync wakes the weights when it is done."""
    return host.after(_sync(host).body[-1], _wake(host, "'weights'"))


@survivor
def rollout_wake_moved_to_the_end_of_sync(host: Host) -> str | None:
    """The KV cache is woken at the end of the sync instead of before the rollout."""
    wakes = [c for c in host.engine_calls("wake_up") if "kv_cache" in host.segment(c)]
    if not wakes:
        return None
    start, end = host.lines(host.statement(wakes[0]))
    guard = host.parents[host.statement(wakes[0])]
    assert isinstance(guard, ast.stmt)
    only = isinstance(guard, ast.If) and len(guard.body) == 1
    span = host.lines(guard) if only else (start, end)
    last = host.lines(_sync(host).body[-1])[1]
    margin = _sync(host).body[-1].col_offset
    moved = indented(f"if self.model is not None:\n    {host.segment(wakes[0])}", margin)
    return host.edit((span, ""), ((last, last), moved))


@survivor
def push_before_the_wake(host: Host) -> str | None:
    """The sync pushes first and wakes afterwards."""
    sync = _sync(host)
    wakes = [s for s in sync.body if isinstance(s, ast.If) and ".wake_up(" in host.segment(s)]
    if not wakes:
        return None
    span, last = host.lines(wakes[0]), host.lines(sync.body[-1])[1]
    text = host.text[span[0] : span[1]]
    return host.edit((span, ""), ((last, last), text))


@survivor
def wake_in_the_push_loop(host: Host) -> str:
    """Each push wakes the engine first."""
    inside = [
        s for s in host.body(_sync(host)) if isinstance(s, (ast.If, ast.For)) and "vllm_client" in host.segment(s)
    ]
    return host.before(inside[0].body[0], f"{host.engine}.wake_up(tags=['weights'])")


@survivor
def assignments_before_a_late_wake(host: Host) -> str:
    """A first push of buffers, then a wake, then the rest."""
    first = host.body(_sync(host))[0]
    return host.before(first, f"{_push(host)}\n{_wake(host, 'chr(119)')}")


@survivor
def merge_moved_to_the_caller(host: Host) -> str | None:
    """The caller merges the adapter before the sync and unmerges it afterwards."""
    calls = [
        n for n in ast.walk(host.tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == f"self.{_sync(host).name}"
    ]
    if not calls:
        return None
    statement = host.statement(calls[0])
    start, end = host.lines(statement)
    margin = statement.col_offset
    merge, unmerge = (indented(f"self.model.{name}()", margin) for name in ("merge_adapter", "unmerge_adapter"))
    return host.edit(((start, start), merge), ((end, end), unmerge))


@kind("S", syncing)
def another_parameter(host: Host) -> str:
    """The sync takes an argument."""
    return host.text.replace(f"def {_sync(host).name}(self", f"def {_sync(host).name}(self, force=False", 1)


@kind("S", syncing)
def without_a_wrapper(host: Host) -> str:
    """The sync gets a new name everywhere."""
    return re.sub(rf"\b{_sync(host).name}\b", "push_weights", host.text)


@kind("S", syncing)
def made_asynchronous(host: Host) -> str:
    """The sync becomes a coroutine."""
    return host.text.replace(f"def {_sync(host).name}(", f"async def {_sync(host).name}(", 1)


@kind("S", syncing)
def defined_twice(host: Host) -> str:
    """The class defines the sync twice, under a condition on the version for instance."""
    return host.with_method(_sync_text(host))


@kind("S", syncing)
def second_class_with_a_sync(host: Host) -> str:
    """Another class of the file has a sync of its own."""
    return host.with_function(f"class _Other:\n{_sync_text(host).rstrip()}\n")


@kind("S", syncing)
def moved_to_a_mixin(host: Host) -> str:
    """The sync moves to a base class of the same file."""
    start, end = host.lines(_sync(host))
    return host.edit(((start, end), "")).rstrip() + f"\n\n\nclass _SyncMixin:\n{_sync_text(host).rstrip()}\n"


@kind("S", syncing)
def turned_into_a_function(host: Host) -> str:
    """The sync becomes a function that takes the trainer."""
    start, end = host.lines(_sync(host))
    return host.edit(((start, end), "")).rstrip() + f"\n\n\n{indented(_sync_text(host), 0)}"


@kind("S", syncing)
def docstring_changed(host: Host) -> str:
    """The sync's docstring is there, and says more."""
    return (
        host.before(host.body(_sync(host))[0], '"Push. Calls self.llm.wake_up() and load_weights() where needed."')
        if (ast.get_docstring(_sync(host)) is None)
        else host.text.replace(ast.get_docstring(_sync(host), clean=False) or "", "Push every weight.", 1)
    )


@kind("S", syncing)
def early_return_of_its_own(host: Host) -> str:
    """The sync returns early when nothing has been trained."""
    return host.before(host.body(_sync(host))[0], "if self.state.global_step < 0:\n    return")


@kind("S", syncing)
def decorated(host: Host) -> str:
    """The sync gets a decorator."""
    return (
        host.before(_sync(host), "@torch.no_grad()")
        if not _sync(host).decorator_list
        else host.replace(_sync(host).decorator_list[0], "torch.no_grad()")
    )


@kind("S", syncing)
def body_in_a_with(host: Host) -> str:
    """The whole sync is timed."""
    body = host.body(_sync(host))
    start, end = host.lines(body[0])[0], host.lines(body[-1])[1]
    inside = indented(host.text[start:end], body[0].col_offset + 4)
    return host.edit(((start, end), indented("with nullcontext():", body[0].col_offset) + inside))


@kind("S", syncing)
def body_in_a_try(host: Host) -> str:
    """The sync reports failures."""
    body = host.body(_sync(host))
    start, end = host.lines(body[0])[0], host.lines(body[-1])[1]
    column = body[0].col_offset
    inside = indented(host.text[start:end], column + 4)
    return host.edit(
        ((start, end), indented("try:", column) + inside + indented("finally:\n    self._synced = True", column))
    )


@kind("S", syncing)
def split_into_a_private_helper(host: Host) -> str:
    """The body moves to a helper that only the sync calls."""
    body = host.body(_sync(host))
    start, end = host.lines(body[0])[0], host.lines(body[-1])[1]
    moved = host.edit(((start, end), indented("self._push_everything()", body[0].col_offset)))
    helper = f"def _push_everything(self):\n{indented(host.text[start:end], 4)}"
    return Host(host.release, host.path, host.cls, moved).with_method(helper)


@kind("S", syncing)
def push_reordered(host: Host) -> str:
    """The prefix cache is reset before the push instead of after it."""
    body = host.body(_sync(host))
    start, end = host.lines(body[-1])
    first = host.lines(body[0])[0]
    return host.edit(((start, end), ""), ((first, first), host.text[start:end]))


@kind("S", syncing)
def batched_push(host: Host) -> Iterator[str]:
    """Weights are pushed in one call instead of one by one."""
    for push in host.pushes:
        yield host.replace(push.args[0], f"list({host.segment(push.args[0])})")


@kind("S", syncing)
def push_by_another_method(host: Host) -> Iterator[str]:
    """The model is given its weights by another method."""
    for push in host.pushes:
        assert isinstance(push.func, ast.Attribute)
        yield host.replace(push.func, f"{host.segment(push.func.value)}.update_weights")


@kind("S", syncing)
def another_path_to_the_model(host: Host) -> str:
    """vLLM moves the model, and TRL follows."""
    return host.text.replace(
        WORKER_MODEL, "llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()"
    )


@kind("S", syncing)
def pushes_removed(host: Host) -> str:
    """The sync only resets the cache: weights are shared some other way."""
    return re.sub(r"(?m)^(\s*)(\S.*\.load_weights\(.*)$", r"\1pass", host.text)
