"""B: what upstream adds beside its engines: methods, functions, fields and modules that must not be refused."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from tests.mutation.hosts import Host, config_hosts, host, indented, read, tree_of
from tests.mutation.kinds.added_spellings import everywhere
from tests.mutation.mutants import Change, kind


def beside(make: Callable[[Host], Change | Iterator[Change]]) -> Callable[[Host], Change | Iterator[Change]]:
    kind("B", everywhere)(make)
    return make


@beside
def new_unrelated_method(on: Host) -> str:
    """A new method without an engine."""
    return on.with_method(
        f"def _new_metric({on.receiver}, rewards):\n    return sum(rewards) / max(len(rewards), 1)\n"
    )


@beside
def new_unrelated_function(on: Host) -> str:
    """A new function without an engine."""
    return on.with_function("def new_metric(rewards):\n    return sum(rewards)\n")


@beside
def new_unrelated_class(on: Host) -> str:
    """A new class without an engine."""
    return on.with_function("class NewMetric:\n    def __init__(self, rewards):\n        self.rewards = rewards\n")


@beside
def transformers_generate(on: Host) -> str:
    """The policy generates with transformers."""
    return on.with_method(
        f"def _sample({on.receiver}, ids):\n    return {on.receiver}.model.generate(ids, max_new_tokens=4)\n"
    )


@beside
def server_generate(on: Host) -> str:
    """The server's client generates: no engine of this process."""
    return on.with_method(
        f"def _ask({on.receiver}, prompts):\n    return {on.receiver}.vllm_client.generate(prompts=prompts, n=1)\n"
    )


@beside
def tokenizer_chat_template(on: Host) -> str:
    """Prompts are formatted in a new method."""
    return on.with_method(
        f"def _format({on.receiver}, chat):\n    return {on.receiver}.processing_class.apply_chat_template(chat)\n"
    )


@beside
def time_sleep(on: Host) -> str:
    """A new method waits."""
    return on.with_method("def _wait(*_):\n    import time\n\n    time.sleep(1)\n")


@beside
def own_sleep_method(on: Host) -> str:
    """Another object has a method `sleep`."""
    return on.with_method(f"def _pause({on.receiver}):\n    {on.receiver}.accelerator.sleep(level=1)\n")


@beside
def prefix_cache_reset(on: Host) -> str:
    """A new method resets the prefix cache."""
    return on.with_method(f"def _forget({on.receiver}):\n    {on.engine}.reset_prefix_cache()\n")


@beside
def length_read(on: Host) -> str:
    """A new method reads the longest length from the engine's configuration (GRPO 0.26)."""
    return on.with_method(
        f"def _longest({on.receiver}):\n    return {on.engine}.llm_engine.model_config.max_model_len\n"
    )


@beside
def engine_asked_for_none(on: Host) -> str:
    """A new method asks whether there is an engine."""
    return on.with_method(f"def _has_engine({on.receiver}):\n    return {on.engine} is not None\n")


@beside
def attribute_asked_for(on: Host) -> str:
    """A new method asks with hasattr()."""
    return on.with_method(f'def _has_engine({on.receiver}):\n    return hasattr({on.owner}, "{on.attribute}")\n')


@beside
def another_llm(on: Host) -> str:
    """Another object's text mentions an llm: a dictionary's key, a metric's name."""
    return on.with_method(f'def _names({on.receiver}):\n    return {{"llm_judge": 1, "metrics/llm": 2, "llms": 3}}\n')


@kind("B", config_hosts)
def help_mentions_the_engine(on: Host) -> str:
    """A field's help explains `self.llm.sleep(level=2)`."""
    fields = [n for n in (on.class_node.body if on.class_node else []) if isinstance(n, ast.AnnAssign)]
    return on.before(
        fields[-1], 'new: int = field(default=0, metadata={"help": "Level of self.llm.sleep(level=2), LLM(x)."})'
    )


@kind("B", config_hosts)
def another_default(on: Host) -> str:
    """A default changes."""
    return on.text.replace("default=0.3", "default=0.4").replace("default=1e-6", "default=1e-5")


@kind("B", config_hosts)
def one_more_check(on: Host) -> str | None:
    """`__post_init__` checks one thing more."""
    method = on.method("__post_init__")
    return (
        None
        if method is None
        else on.after(method.body[-1], "if self.use_vllm is Ellipsis:\n    raise ValueError('use_vllm')")
    )


def _grpo(release: str) -> Iterator[Host]:
    yield host(release, "trl/trainer/grpo_trainer.py", "GRPOTrainer")


@kind("B", _grpo)
def new_module_without_an_engine(on: Host) -> Change:
    """A new module that has nothing to do with rollouts."""
    code = "def length_reward(completions, **kwargs):\n    return [len(c) for c in completions]\n"
    return {"trl/rewards/length_rewards.py": code}


@kind("B", _grpo)
def new_subclass_without_an_engine(on: Host) -> Change:
    """A new subclass changes the loss alone."""
    method = "def _compute_loss(self, model, inputs):\n        return super()._compute_loss(model, inputs)\n"
    head = "from trl.trainer.grpo_trainer import GRPOTrainer\n\n\nclass NewLossTrainer(GRPOTrainer):\n"
    code = f"{head}    {method}"
    return {"trl/experimental/newloss/newloss_trainer.py": code, "trl/experimental/newloss/__init__.py": ""}


@kind("B", _grpo)
def new_module_mentions_the_engine(on: Host) -> Change:
    """A new module's docstring and comments mention the call."""
    docstring = '"""Rewards. A trainer calls self.llm.generate(prompts) first."""'
    code = f'{docstring}\n\n# trainer.llm.sleep(level=2)\nNAMES = ["llm-judge"]\n'
    return {"trl/rewards/judge_rewards.py": code}


@kind("B", _grpo)
def transformers_pipeline_elsewhere(on: Host) -> Change:
    """A script generates with transformers."""
    path = "trl/trainer/utils.py"
    return {path: f"{read(on.release, path).rstrip()}\n\n\ndef sample(model, ids):\n    return model.generate(ids)\n"}


@kind("B", _grpo)
def server_script_changes(on: Host) -> Change:
    """TRL's server, a process of its own, gains a call on its engine."""
    path = "trl/scripts/vllm_serve.py"
    if not (tree_of(on.release) / path).is_file() or "LLM(" not in read(on.release, path):
        return None
    added = indented("def warm_up(llm):\n    return llm.generate(['a'])\n", 0)
    return {path: f"{read(on.release, path).rstrip()}\n\n\n{added}"}
