"""All weights of a real engine, sent as to an actor on Ray, by threads of this process in Ray's place."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

from tests.cpu.scenarios import TOLERANCE  # noqa: E402
from tests.ray.local_calls import LocalCalls, LocalEngines  # noqa: E402
from trlpatch.errors import EngineLost, StaleAdapter  # noqa: E402
from trlpatch.policy.policy_weights import policy_weights  # noqa: E402
from trlpatch.ray.actor import LLMRayActor  # noqa: E402
from trlpatch.ray.messages import RolloutRequest, RolloutResponse  # noqa: E402
from trlpatch.ray.transfer import shapes  # noqa: E402
from trlpatch.ray.transfer.policy_transfer import PolicyTransfer  # noqa: E402
from trlpatch.ray.transfer.sender import WeightSender  # noqa: E402

pytestmark = pytest.mark.cpu

PROMPT = {"prompt_token_ids": list(range(5, 30))}
PARTS = 2**19
"""Bytes a part: the model is 5 MB."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, so that a weight has two names."""
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def actor(checkpoint: Path) -> Iterator[LLMRayActor]:
    def build(arguments: Any) -> Any:
        route = shapes.route_for("cpu")
        return tiny.engine(checkpoint, enable_lora=False, **arguments, **shapes.engine_arguments(route))

    made = LLMRayActor(0, {}, build=build)
    made.ready()
    yield made
    made.shutdown()


@pytest.fixture
def engines(actor: LLMRayActor) -> LocalEngines:
    return LocalEngines([actor])


@pytest.fixture
def sender(engines: LocalEngines) -> WeightSender:
    return WeightSender(engines, calls=LocalCalls(), chunk_bytes=PARTS)


def trained(checkpoint: Path, seed: int, **lora: Any) -> Any:
    """The checkpoint with every weight moved, as a full fine-tuning would."""
    from transformers import AutoModelForCausalLM

    model = tiny.policy(checkpoint, **lora) if lora else AutoModelForCausalLM.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model


def rollout(actor: LLMRayActor, tokens: int = 8, weights: str | None = None) -> RolloutResponse:
    params = vllm.SamplingParams(max_tokens=tokens, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)
    return actor.generate(RolloutRequest([PROMPT], [params], weights=weights))


def gap(model: Any, response: RolloutResponse, since: int = 0) -> float:
    """Of the tokens from `since` on: |log-probability in the engine - that of the model|, the largest."""
    output = response.outputs[0]
    scored = tiny.trainer_logprobs(model, output.prompt_token_ids, output.outputs[0].token_ids)
    return float((tiny.engine_logprobs(output) - scored)[since:].abs().max())


@pytest.mark.parametrize("names", ["named_parameters", "state_dict"])
def test_the_engine_samples_with_what_was_sent(
    names: str, actor: LLMRayActor, sender: WeightSender, checkpoint: Path
) -> None:
    model = trained(checkpoint, seed=len(names))
    control = gap(model, rollout(actor))  # also leaves a prefix in the cache
    pairs = model.named_parameters() if names == "named_parameters" else model.state_dict().items()
    sent = sender.send(pairs, version=names)
    response = rollout(actor, weights=names)
    assert gap(model, response) < TOLERANCE < 0.1 < control
    assert actor.get_weight_version() == response.first_version.weights == response.last_version.weights == names
    assert sent.parts > 5
    assert sent.engines == (0,)


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {}], ids=["DoRA", "modules_to_save", "all weights"]
)
def test_a_policy_is_sent_from_its_trained_tensors(
    lora: Any, actor: LLMRayActor, engines: LocalEngines, sender: WeightSender, checkpoint: Path
) -> None:
    model = trained(checkpoint, seed=3, **lora)
    before = gap(model, rollout(actor))
    transfer = PolicyTransfer(engines, sender)
    held = [parameter.detach().clone() for parameter in model.parameters()]
    transfer.start(policy_weights(model))
    sent = transfer.finish()
    assert gap(model, rollout(actor, weights=sent.version)) < TOLERANCE < 0.1 < before
    assert all(torch.equal(*pair) for pair in zip(held, model.parameters(), strict=True))
    assert f"sent to 1 engines (version {engines.weights_version}, " in transfer.description


def test_what_is_written_while_it_is_sent_is_sent_again(
    actor: LLMRayActor, engines: LocalEngines, checkpoint: Path
) -> None:
    model = trained(checkpoint, seed=4)

    def train(handle: Any, method: str, args: Any) -> None:
        if method == "update_weights" and not trained_once:
            trained_once.append(True)
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(1.5)

    trained_once: list[bool] = []
    sender = WeightSender(engines, calls=LocalCalls(train), chunk_bytes=PARTS)
    transfer = PolicyTransfer(engines, sender)
    transfer.start(policy_weights(model))
    assert gap(model, rollout(actor, weights=transfer.finish().version)) < TOLERANCE
    assert trained_once


def test_requests_in_flight_go_on_with_the_new_weights(
    actor: LLMRayActor, sender: WeightSender, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with keys and values of theirs: what is sampled after the update is the new model's, given all before."""
    old, new = trained(checkpoint, seed=5), trained(checkpoint, seed=6)
    sender.send(old.named_parameters(), "old")
    reached, updated = threading.Event(), threading.Event()
    inner = actor.call(lambda llm: llm.llm_engine)
    step = inner.step
    steps: list[int] = []

    def one_for_each_command(*args: Any) -> Any:
        """From the 20th step on until the update is done."""
        steps.append(len(steps))
        if len(steps) >= 20:
            reached.set()
            while not (actor.stepper._commands or updated.is_set()):
                time.sleep(0.001)
        return step(*args)

    monkeypatch.setattr(inner, "step", one_for_each_command)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(rollout, actor, 200)
        assert reached.wait(60)
        try:
            sender.send(new.named_parameters(), "new")
        finally:
            updated.set()
        response = running.result()
    monkeypatch.undo()
    assert response.mixed
    assert (response.first_version.weights, response.last_version.weights) == ("old", "new")
    output = response.outputs[0]
    given = output.prompt_token_ids, output.outputs[0].token_ids
    engine = tiny.engine_logprobs(output)
    of_new = (engine - tiny.trainer_logprobs(new, *given)).abs() < TOLERANCE
    switch = int(of_new.logical_not().nonzero().max()) + 1
    assert 15 < switch < 200
    assert (engine - tiny.trainer_logprobs(old, *given))[:switch].abs().max() < TOLERANCE


def test_an_interrupted_update_is_never_sampled_from(
    actor: LLMRayActor, sender: WeightSender, checkpoint: Path
) -> None:
    model = trained(checkpoint, seed=7)

    def interrupted() -> Any:
        for number, pair in enumerate(model.named_parameters()):
            if number == 9:
                raise KeyboardInterrupt
            yield pair

    with pytest.raises(KeyboardInterrupt):
        sender.send(interrupted(), "half")
    with pytest.raises(StaleAdapter, match="half-written"):
        rollout(actor)
    sender.send(model.named_parameters(), "whole")
    assert gap(model, rollout(actor, weights="whole")) < TOLERANCE


def test_an_engine_whose_update_failed_is_lost(
    actor: LLMRayActor, engines: LocalEngines, sender: WeightSender, checkpoint: Path
) -> None:
    """The last test of this engine."""
    model = trained(checkpoint, seed=8)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(EngineLost, match=r"lost rollout engines 0 .*no engine is left"):
        sender.send(weights.items(), "wrong")
    with pytest.raises(EngineLost, match="has to be replaced"):
        rollout(actor)
    assert actor.health().state == "lost"
