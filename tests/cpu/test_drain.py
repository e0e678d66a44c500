"""Draining a real engine core that schedules ahead: what was in flight is gone, and the next rollout is its own.

vLLM turns asynchronous scheduling off on a CPU. Its batch queue, where steps in flight are kept, runs there too.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

import trlpatch  # noqa: E402
from trlpatch.engine import probes  # noqa: E402
from trlpatch.engine.attach import detach_engine  # noqa: E402
from trlpatch.engine.drain import drain, unfinished  # noqa: E402

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model: Any) -> Any:
    return tiny.engine(model)


@pytest.fixture
def queue(llm: Any) -> Iterator[deque[Any]]:
    """The engine core's batch queue, switched on as for an engine that schedules asynchronously."""
    core = probes.engine_core(llm)
    before = (core.batch_queue, core.batch_queue_size, core.step_fn)
    core.batch_queue, core.batch_queue_size, core.step_fn = deque(maxlen=2), 2, core.step_with_batch_queue
    yield core.batch_queue
    core.batch_queue, core.batch_queue_size, core.step_fn = before


def ask(llm: Any, name: str) -> None:
    params = vllm.SamplingParams(max_tokens=6, temperature=0.0)
    llm.llm_engine.add_request(name, {"prompt_token_ids": [7, 8, 9]}, params)


def generated(llm: Any) -> list[int]:
    params = vllm.SamplingParams(max_tokens=6, temperature=0.0)
    (output,) = llm.generate([{"prompt_token_ids": [11, 12, 13]}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def leave_in_flight(llm: Any, queue: deque[Any]) -> None:
    """Abort a request whose step was scheduled and not answered."""
    ask(llm, "interrupted")
    while not queue:
        llm.llm_engine.step()
    (name,) = llm.llm_engine.output_processor.request_states
    llm.llm_engine.abort_request([name], internal=True)
    assert queue
    assert not unfinished(llm)


def test_an_idle_engine_has_nothing_to_drain(llm: Any, queue: deque[Any]) -> None:
    expected = generated(llm)
    drain(llm)
    assert not queue
    assert generated(llm) == expected


def test_steps_in_flight_are_taken(llm: Any, queue: deque[Any]) -> None:
    expected = generated(llm)
    leave_in_flight(llm, queue)
    drain(llm)
    assert not queue
    assert generated(llm) == expected


def test_unfinished_requests_are_not_stepped(llm: Any, queue: deque[Any]) -> None:
    ask(llm, "running")
    llm.llm_engine.step()
    before = list(queue)
    drain(llm)
    assert unfinished(llm)
    assert list(queue) == before
    while unfinished(llm):
        llm.llm_engine.step()


def test_a_hand_over_drains(llm: Any, queue: deque[Any], model: Any) -> None:
    policy = trlpatch.attach_engine(tiny.policy(model), llm)
    try:
        leave_in_flight(llm, queue)
        tiny.move(policy, seed=1)
        request = policy.load_lora()
        assert not queue
        params = vllm.SamplingParams(max_tokens=6, logprobs=0)
        (output,) = llm.generate([{"prompt_token_ids": [11, 12, 13]}], params, lora_request=request, use_tqdm=False)
        theirs = tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)
        assert float((tiny.engine_logprobs(output) - theirs).abs().max()) < 1e-4
    finally:
        detach_engine(policy)
