"""A: a second rollout in canonical spelling, in every scope and file that upstream might put it into."""

from __future__ import annotations

from collections.abc import Callable

from tests.mutation.hosts import Host, indented
from tests.mutation.kinds.added_spellings import PARAMETERS, everywhere, method
from tests.mutation.mutants import kind


def scope(make: Callable[[Host], str | None]) -> Callable[[Host], str | None]:
    """Register a kind that was once not seen."""
    kind("A", everywhere, former_survivor=True)(make)
    return make


def _call(host: Host) -> str:
    return f"{host.engine}.generate(prompts, sampling_params)"


def _of_trainer(host: Host) -> str:
    """Return the call as a function has it that takes the trainer."""
    return f"trainer.{_call(host).partition('.')[2]}"


@scope
def async_method(host: Host) -> str:
    """Rollouts become asynchronous (trl.experimental.async_grpo)."""
    return method(host, f"return {_call(host)}", head="async def _second_rollout")


@scope
def awaited(host: Host) -> str:
    """An asynchronous engine is awaited."""
    return method(host, f"return await {_call(host)}", head="async def _second_rollout")


@scope
def generator_method(host: Host) -> str:
    """Outputs are streamed."""
    return method(host, f"yield from {_call(host)}")


@scope
def staticmethod_with_trainer(host: Host) -> str | None:
    """A static method takes the trainer."""
    body = f"    return {_of_trainer(host)}\n"
    return (
        host.with_method(f"@staticmethod\ndef _second_rollout(trainer, {PARAMETERS}):\n{body}") if host.cls else None
    )


@scope
def property_that_rolls_out(host: Host) -> str | None:
    """A property samples lazily."""
    body = f"    prompts = sampling_params = None\n    return {_call(host)}\n"
    return host.with_method(f"@property\ndef samples(self):\n{body}") if host.cls else None


@scope
def decorated_method(host: Host) -> str:
    """The new method is profiled."""
    code = f"@profiling_decorator\ndef _second_rollout({host.receiver}, {PARAMETERS}):\n    return {_call(host)}\n"
    return host.with_method(code) if "profiling_decorator" in host.text else host.with_method(code.partition("\n")[2])


@scope
def under_if_in_class(host: Host) -> str | None:
    """The method exists only with a newer vLLM."""
    code = f"if True:\n    def _second_rollout(self, {PARAMETERS}):\n        return {_call(host)}\n"
    return host.with_method(code) if host.cls else None


@scope
def under_try_in_class(host: Host) -> str | None:
    """The method exists only where an import succeeds."""
    code = f"try:\n    def _second_rollout(self, {PARAMETERS}):\n        return {_call(host)}\nfinally:\n    pass\n"
    return host.with_method(code) if host.cls else None


@scope
def lambda_in_class(host: Host) -> str | None:
    """The method is a lambda."""
    return (
        host.with_method(f"second_rollout = lambda self, prompts, sampling_params: {_call(host)}\n")
        if host.cls
        else None
    )


@scope
def nested_function(host: Host) -> str:
    """The call is within a function of a method."""
    return method(host, f"def roll():\n    return {_call(host)}\n\nreturn roll()")


@scope
def nested_class(host: Host) -> str | None:
    """A class within the trainer."""
    code = f"class Sampler:\n    def roll(self, trainer, {PARAMETERS}):\n        return {_of_trainer(host)}\n"
    return host.with_method(code) if host.cls else None


@scope
def callback_class(host: Host) -> str:
    """A callback logs completions, as LogCompletionsCallback and GOLD's own callback do."""
    return host.with_function(f"""
        class _SamplingCallback:
            def __init__(self, trainer):
                self.trainer = trainer

            def on_step_end(self, args, state, control, prompts, sampling_params):
                return self.{_of_trainer(host)}
    """)


@scope
def mixin_class(host: Host) -> str:
    """A mixin in the same file."""
    return host.with_function(f"""
        class _RolloutMixin:
            def _second_rollout(self, {PARAMETERS}):
                return self.{_call(host).partition(".")[2]}
    """)


@scope
def subclass_in_file(host: Host) -> str | None:
    """A subclass of the trainer in the same file."""
    return (
        host.with_function(f"""
        class _Variant({host.cls}):
            def _second_rollout(self, {PARAMETERS}):
                return {_call(host)}
    """)
        if host.cls
        else None
    )


@scope
def module_function(host: Host) -> str:
    """A function of a trainer's file takes the trainer."""
    return host.with_function(f"def second_rollout(trainer, {PARAMETERS}):\n    return {_of_trainer(host)}\n")


@scope
def module_function_taking_the_engine(host: Host) -> str:
    """A method gives the engine to a function of the same file."""
    added = method(host, f"return _roll({host.engine}, prompts)")
    return f"{added.rstrip()}\n\n\ndef _roll(engine, prompts):\n    return engine.generate(prompts)\n"


@scope
def module_function_of_another_file(host: Host) -> dict[str, str | None]:
    """A method gives the engine to a function of trl/trainer/utils.py."""
    from tests.mutation.hosts import read

    utils = "trl/trainer/utils.py"
    added = "def roll_out(engine, prompts):\n    return engine.generate(prompts)\n"
    helper = f"{read(host.release, utils).rstrip()}\n\n\n{added}"
    body = f"from trl.trainer.utils import roll_out\nreturn roll_out({host.engine}, prompts)"
    return {host.path: method(host, body), utils: helper}


@scope
def async_module_function(host: Host) -> str:
    """An asynchronous function of a trainer's file takes the trainer."""
    return host.with_function(f"async def second_rollout(trainer, {PARAMETERS}):\n    return {_of_trainer(host)}\n")


@scope
def module_lambda(host: Host) -> str:
    """A lambda at module level takes the trainer."""
    return host.with_function(f"second_rollout = lambda trainer, prompts, sampling_params=None: {_of_trainer(host)}\n")


@scope
def under_if_at_module_level(host: Host) -> str:
    """The function exists only with vLLM."""
    code = f"if True:\n    def second_rollout(trainer, {PARAMETERS}):\n        return {_of_trainer(host)}\n"
    return host.with_function(code)


@scope
def default_value(host: Host) -> str:
    """The default value of a parameter rolls out."""
    return host.with_function(
        f"def second_rollout(trainer, prompts=0, sampling_params=0, roll=lambda trainer, prompts, sampling_params: "
        f"{_of_trainer(host)}):\n    return roll(trainer, prompts, sampling_params)\n"
    )


@scope
def property_for_the_engine(host: Host) -> str | None:
    """A property gives the engine another name."""
    code = f"""
        @property
        def rollout_engine(self):
            return {host.engine}

        def _second_rollout(self, prompts):
            return self.rollout_engine.generate(prompts)
    """
    return host.with_method(code) if host.cls else None


@scope
def engine_kept_by_the_constructor(host: Host) -> str | None:
    """The constructor of another class keeps the engine."""
    if not host.cls:
        return None
    added = host.with_method(f"def sampler(self):\n    return _Sampler({host.engine})\n")
    return added + indented(
        """

        class _Sampler:
            def __init__(self, engine):
                self.engine = engine

            def roll(self, prompts):
                return self.engine.generate(prompts)
        """,
        0,
    )


@scope
def inside_an_existing_method(host: Host) -> str | None:
    """A method that is there and did not roll out now does, through an alias."""
    methods = [f for f in (host.class_node.body if host.class_node else []) if getattr(f, "name", "") in {
        "log", "_save_checkpoint", "reset_prefix_cache", "get_train_dataloader", "_set_signature_columns_if_needed",
        "_place_features", "_calculate_rewards", "_fix_param_name_to_vllm", "extract_logprobs",
    }]  # fmt: skip
    if not methods:
        return None
    first = host.body(methods[0])[0]  # type: ignore[arg-type]
    return host.before(first, f"engine = {host.engine}\nengine.generate([])")


@scope
def canonical_inside_an_existing_method(host: Host) -> str | None:
    """A method that is there and did not roll out now does."""
    methods = [f for f in (host.class_node.body if host.class_node else []) if getattr(f, "name", "") in {
        "log", "_save_checkpoint", "get_train_dataloader", "_set_signature_columns_if_needed", "_place_features",
    }]  # fmt: skip
    if not methods:
        return None
    return host.before(host.body(methods[0])[0], f"_ = {host.engine}.generate([])")  # type: ignore[arg-type]
