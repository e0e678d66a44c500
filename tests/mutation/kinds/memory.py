"""Z: sleep, wake and reload, elsewhere, through other objects, with other arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.mutation.hosts import Host, indented
from tests.mutation.kinds.added_spellings import everywhere, method
from tests.mutation.mutants import kind


def _added(name: str, code: str, why: str, *, survivor: bool = True) -> None:
    """Register a kind that adds a statement to a new method, and before the rollout."""

    def add(host: Host) -> Iterator[str]:
        text = code.format(engine=host.engine, owner=host.owner, attribute=host.attribute)
        yield method(host, text)
        if host.rollouts:
            yield host.before(host.statement(host.rollouts[0]), text)

    add.__doc__ = why
    kind("Z", everywhere, former_survivor=survivor, name=name)(add)


_added("extra_sleep", "{engine}.sleep(level=2)", "One more sleep, canonically.", survivor=False)
_added("extra_wake", '{engine}.wake_up(tags=["kv_cache"])', "One more wake, canonically.", survivor=False)
_added("extra_reload", '{engine}.collective_rpc("reload_weights")', "One more reload (trl #5312).", survivor=False)
_added("sleep_through_alias", "e = {engine}\ne.sleep(level=2)", "A local name stands for the engine.")
_added("wake_through_alias", "e = {engine}\ne.wake_up()", "A local name stands for the engine.")
_added("sleep_of_llm_engine", "{engine}.llm_engine.sleep(2)", "The engine inside of the LLM sleeps.")
_added("wake_of_llm_engine", "{engine}.llm_engine.wake_up()", "The engine inside of the LLM wakes.")
_added("sleep_by_executor", "{engine}.llm_engine.model_executor.sleep(level=2)", "The executor sleeps.")
_added("sleep_by_rpc", '{engine}.collective_rpc("sleep", kwargs={{"level": 2}})', "The workers sleep.")
_added("wake_by_rpc", '{engine}.collective_rpc("wake_up")', "The workers wake.")
_added("reload_through_llm_engine", '{engine}.llm_engine.collective_rpc("reload_weights")', "Reload, below the LLM.")
_added("reload_by_another_name", '{engine}.collective_rpc("reload_model")', "vLLM renames the reload.")
_added("reload_by_variable", 'name = "reload_weights"\n{engine}.collective_rpc(name)', "The name is in a variable.")
_added("reload_by_keyword", '{engine}.collective_rpc(method="reload_weights")', "The name is given by keyword.")
_added("reload_by_function", "{engine}.collective_rpc(lambda worker: worker.reload_weights())", "A function is sent.")
_added("reload_as_method", "{engine}.reload_weights()", "vLLM gives the LLM a method for it.")
_added(
    "reload_by_model_runner",
    "{engine}.llm_engine.model_executor.driver_worker.model_runner.reload_weights()",
    "Below.",
)
_added("update_weights_from_disk", '{engine}.update_weights("checkpoint")', "From disk under another name.")
_added("sleep_by_getattr", 'getattr({engine}, "sleep")(level=2)', "The method is chosen by its name.")
_added("sleep_of_a_named_engine", 'getattr({owner}, "{attribute}").sleep(2)', "The engine is chosen by its name.")
_added("sleep_in_a_loop", "for e in [{engine}]:\n    e.sleep(level=2)", "Several engines sleep.")
_added("bound_sleep", "sleep = {engine}.sleep\nsleep(level=2)", "The method gets a name.")
_added("sleep_at_exit", "import atexit\natexit.register({engine}.sleep)", "The engine sleeps at exit.")
_added("engine_deleted", "del {engine}", "The engine is taken down, to be built again.")
_added("engine_shut_down", "{engine}.llm_engine.engine_core.shutdown()", "The engine's core is shut down.")
_added("engine_replaced", "{engine} = LLM(model='m')", "The engine is built again.")
_added("engine_set_aside", "{owner}._set_aside, {engine} = {engine}, None", "The engine is set aside.")
_added("adapter_added", "{engine}.llm_engine.add_lora(None)", "TRL loads a LoRA into the engine.")
_added("adapter_removed", "{engine}.llm_engine.remove_lora(1)", "TRL removes a LoRA from the engine.")
_added("caches_reset", "{engine}.reset_mm_cache()", "vLLM gains a cache, and TRL resets it.", survivor=False)


@kind("Z", former_survivor=True)
def sleep_in_an_async_method(host: Host) -> str:
    """A coroutine puts the engine to sleep."""
    return method(host, f"{host.engine}.sleep(level=2)", head="async def _put_to_sleep")


@kind("Z", former_survivor=True)
def sleep_in_a_callback(host: Host) -> str:
    """A callback puts the engine to sleep after each step."""
    engine = f"trainer.{host.engine.partition('.')[2]}"
    return host.with_function(f"class _Nap:\n    def on_step_end(self, trainer):\n        {engine}.sleep(level=2)\n")


@kind("Z", former_survivor=True)
def sleep_in_a_function(host: Host) -> str:
    """A function of the trainer's file puts the engine to sleep."""
    return host.with_function(f"def nap(trainer):\n    trainer.{host.engine.partition('.')[2]}.sleep(level=2)\n")


@kind("Z")
def level_by_setting(host: Host) -> Iterator[str]:
    """The level of sleep becomes a setting."""
    for call in host.engine_calls("sleep"):
        yield host.replace(call, f"{host.segment(call.func)}(level={host.receiver}.args.vllm_sleep_level)")


@kind("Z")
def level_by_position(host: Host) -> Iterator[str]:
    """The level of sleep is passed by position."""
    for call in host.engine_calls("sleep"):
        yield host.replace(call, f"{host.segment(call.func)}(1)")


@kind("Z")
def sleep_with_another_keyword(host: Host) -> Iterator[str]:
    """vLLM's sleep gains an argument, and TRL passes it."""
    for call in host.engine_calls("sleep"):
        yield host.replace(call, f'{host.segment(call.func)}(level=2, mode="abort")')


@kind("Z")
def wake_without_tags(host: Host) -> Iterator[str]:
    """Everything is woken at once (GRPO 0.23)."""
    for call in host.engine_calls("wake_up"):
        yield host.replace(call, f"{host.segment(call.func)}()")


@kind("Z")
def wake_with_more_tags(host: Host) -> Iterator[str]:
    """vLLM gains a tag (`scheduling`, 0.17), and TRL wakes it."""
    for call in host.engine_calls("wake_up"):
        yield host.replace(call, f'{host.segment(call.func)}(tags=["weights", "kv_cache", "scheduling"])')


@kind("Z")
def memory_call_removed(host: Host) -> Iterator[str]:
    """A sleep, wake or reload is not there any more."""
    for call in host.engine_calls("sleep", "wake_up", "collective_rpc"):
        yield host.replace(host.statement(call), "pass")


@kind("Z")
def memory_call_twice(host: Host) -> Iterator[str]:
    """A sleep, wake or reload is there twice."""
    for call in host.engine_calls("sleep", "wake_up", "collective_rpc"):
        yield host.after(host.statement(call), host.segment(call))


@kind("Z")
def memory_call_moved_to_a_helper(host: Host) -> Iterator[str]:
    """A sleep, wake or reload moves to a method of its own (GOLD's `_wake_vllm_if_needed`)."""
    for call in host.engine_calls("sleep", "wake_up"):
        moved = f"{host.receiver}._memory()" if host.cls else f"_memory({host.receiver})"
        changed = Host(host.release, host.path, host.cls, host.replace(call, moved))
        yield changed.with_method(f"def _memory({host.receiver}):\n    {host.segment(call)}\n")


@kind("Z")
def memory_call_without_its_condition(host: Host) -> Iterator[str]:
    """A sleep or wake loses the condition around it."""
    for call in host.engine_calls("sleep", "wake_up"):
        guard = host.parents[host.statement(call)]
        if isinstance(guard, ast.If):
            yield host.replace(guard.test, "True")


@kind("Z")
def sleep_right_before_the_rollout(host: Host) -> str | None:
    """TRL sleeps before it rolls out."""
    sleeps = host.engine_calls("sleep")
    if not sleeps:
        return None
    statement = host.statement(host.rollouts[0])
    start, _ = host.lines(statement)
    old = host.lines(host.statement(sleeps[-1]))
    return host.edit(
        (old, indented("pass", host.statement(sleeps[-1]).col_offset)),
        ((start, start), indented(host.segment(sleeps[-1]), statement.col_offset)),
    )
