"""Prefetch between a trainer and its engines: what is generated ahead, when it is used, and for whom it is refused."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from trlpatch.errors import PrefetchNotSupported
from trlpatch.ray.prefetch import Prefetch, refuse_prefetch

WAIT = 60.0


class GRPOTrainer:
    """What of TRL's trainer a batch passes through; `sync` stands for its push of weights."""

    def __init__(self, engines: FakePrefetchEngines, repeats: int = 1) -> None:
        self.engines = engines
        self.repeats = repeats
        self.model = SimpleNamespace(training=True)
        self.args = SimpleNamespace(vllm_enable_sleep_mode=False)
        self.data_collator = list
        self.step = 0
        self.used: list[Any] = []
        self.order = engines.order

    def get_train_dataloader(self) -> Any:
        """As accelerate's, which has one batch in hand when it gives out the one before."""
        collate = self.data_collator
        batches = [[f"b{i}"] for i in range(3) for _ in range(self.repeats)]

        def ahead() -> Any:
            held = collate(batches[0])
            for batch in batches[1:]:
                given, held = held, collate(batch)
                yield given
            yield held

        return ahead()

    def _prepare_inputs(self, inputs: Any) -> Any:
        if self.step % self.repeats == 0:
            self.buffered = self._generate_and_score_completions(inputs)
        self.step += 1
        return self.buffered

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.order.append(f"sync {inputs[0]}")
        answers = self.engines.generate(inputs, {"n": 2}, lora_request=object(), use_tqdm=False)
        self.order.append(f"score {inputs[0]}")
        self.used.append(answers)
        return answers

    def train(self) -> None:
        for batch in self.get_train_dataloader():
            self._prepare_inputs(batch)
            self.order.append(f"train {batch[0]}")


class FakePrefetchEngines:
    """Answers a prompt with its name in capitals."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.prefetch: Prefetch | None = None
        self.threads: list[str] = []
        self.begun = threading.Semaphore(0)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        assert self.prefetch is not None
        return self.prefetch.asked("generate", *args, **kwargs)

    def generate_now(self, prompts: Any, params: Any, **kwargs: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return [prompt.upper() for prompt in prompts]


def rig(**changes: Any) -> tuple[GRPOTrainer, FakePrefetchEngines, Prefetch]:
    engines = FakePrefetchEngines()
    trainer = GRPOTrainer(engines, **changes)
    engines.prefetch = Prefetch(trainer, engines.generate_now, engines.generate_now)
    return trainer, engines, engines.prefetch


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_every_batch_but_the_first_is_generated_ahead(repeats: int) -> None:
    trainer, engines, prefetch = rig(repeats=repeats)
    trainer.train()
    assert trainer.used == [["B0"], ["B1"], ["B2"]]
    assert (prefetch.used, prefetch.wasted) == (2, 0)
    assert [name == "trlpatch-prefetch" for name in engines.threads] == [False, True, True]


def test_a_batch_is_asked_for_before_the_one_before_is_trained_on() -> None:
    trainer, _, _ = rig()
    trainer.train()
    # The second "sync b1" is the call that uses what the first one has found out.
    assert trainer.order == [
        "sync b0", "score b0", "sync b1", "train b0", "sync b1", "score b1", "sync b2", "train b1", "sync b2",
        "score b2", "train b2",
    ]  # fmt: skip


def test_weights_are_not_sent_while_a_batch_is_generated_ahead() -> None:
    trainer, engines, _ = rig()
    answered = threading.Event()

    def slow(prompts: Any, params: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "trlpatch-prefetch":
            engines.begun.release()
            answered.wait(WAIT)
            engines.order.append("answered")
        return [prompt.upper() for prompt in prompts]

    assert engines.prefetch is not None
    engines.prefetch._calls["generate"] = slow
    batches = trainer.get_train_dataloader()
    trainer._prepare_inputs(next(batches))
    assert engines.begun.acquire(timeout=WAIT)
    engines.order.clear()
    threading.Timer(0.05, answered.set).start()  # whenever that is: nothing may happen before
    trainer._prepare_inputs(next(batches))
    assert engines.order[:2] == ["answered", "sync b1"]


def test_what_is_asked_otherwise_is_generated_anew(caplog: pytest.LogCaptureFixture) -> None:
    trainer, _, prefetch = rig()
    batches = trainer.get_train_dataloader()
    trainer._prepare_inputs(next(batches))
    next(batches)
    trainer._prepare_inputs(["other"])
    assert trainer.used[-1] == ["OTHER"]
    assert prefetch.wasted == 1
    assert "does not ask for" in caplog.text


def test_an_evaluation_leaves_what_was_generated_ahead() -> None:
    trainer, _, prefetch = rig()
    batches = trainer.get_train_dataloader()
    trainer._prepare_inputs(next(batches))
    trainer.model.training = False
    trainer._generate_and_score_completions(["eval"])
    trainer.model.training = True
    trainer._prepare_inputs(next(batches))
    assert trainer.used == [["B0"], ["EVAL"], ["B1"]]
    assert prefetch.used == 1


def test_what_the_engines_raise_reaches_the_step_that_would_have_used_it() -> None:
    trainer, _, prefetch = rig()

    def fail(prompts: Any, params: Any, **kwargs: Any) -> Any:
        if prompts == ["b1"]:
            raise KeyError("engine")
        return prompts

    prefetch._calls["generate"] = fail
    batches = trainer.get_train_dataloader()
    trainer._prepare_inputs(next(batches))
    with pytest.raises(KeyError, match="engine"):
        trainer._prepare_inputs(next(batches))


@pytest.mark.parametrize("name", ["rollout_func", "tools", "environments"])
def test_what_is_asked_next_must_not_depend_on_answers(name: str) -> None:
    trainer, _, _ = rig()
    setattr(trainer, name, [print])
    with pytest.raises(PrefetchNotSupported, match=f"{name} is set"):
        trainer.train()


def test_engines_that_sleep_are_refused() -> None:
    trainer, _, _ = rig()
    trainer.args.vllm_enable_sleep_mode = True
    with pytest.raises(PrefetchNotSupported, match="vllm_enable_sleep_mode=True"):
        trainer.train()


class RLOOTrainer:
    """Has no log-probabilities of the sampler in any release."""


def refused(trainer: Any, depth: Any = 1, **changes: Any) -> str:
    args = SimpleNamespace(**{"vllm_importance_sampling_correction": True, **changes})
    with pytest.raises(PrefetchNotSupported) as error:
        refuse_prefetch(trainer, args, depth)
    return str(error.value)


def test_trainers_that_cannot_correct_are_refused_with_the_reason() -> None:
    trainer, _, _ = rig()
    refuse_prefetch(trainer, SimpleNamespace(vllm_importance_sampling_correction=True), 1)
    assert "RLOOTrainer with create_engines(prefetch=1): its loss does not have" in refused(RLOOTrainer())
    assert "=False: nothing would correct" in refused(trainer, vllm_importance_sampling_correction=False)
    assert "dataloader_num_workers=2" in refused(trainer, dataloader_num_workers=2)
    assert "4 ranks" in refused(trainer, world_size=4)
    assert "prefetch=2: one batch" in refused(trainer, 2)
    with pytest.raises(PrefetchNotSupported, match=r"came with 0\.23"):
        refuse_prefetch(trainer, SimpleNamespace(), 1)
