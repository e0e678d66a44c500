"""What Ray itself does when processes die, and what is made of it, with actors that are no engines.

Functions for `tests.ray.grpo_runs`, which has Ray and engines up; each returns what the tests look at.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from trlpatch.ray.faults import all_errors_travel, fault_of
from trlpatch.ray.fleet import RayCluster
from trlpatch.ray.messages import EngineHealth, Version
from trlpatch.ray.spread import Group, Spread
from trlpatch.ray.supervision import Supervisor
from trlpatch.ray.timeouts import Timeouts

DRIVER_SECONDS = 180.0
"""For a driver to join the cluster and to have two actors up."""
ANSWER_SECONDS = 90.0
"""For an actor to raise, or for Ray to say that it has ended."""


class OddSignature(Exception):
    """Can be pickled and not unpickled."""

    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(f"{code}: {text}")


@all_errors_travel
class ToyEngine:
    """Answers prompts, which are numbers, with ten times as much. No engine: it has what the supervisor calls."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.aborted = threading.Event()

    def ready(self) -> int:
        """Say which process it is."""
        return os.getpid()

    def health(self) -> EngineHealth:
        """Say that it steps."""
        return EngineHealth(self.index, "running", 0, 1, Version(), 1, 0.0, 1)

    def generate(self, places: Sequence[int], wait: bool) -> list[int]:
        """Answer, or wait for an abort."""
        if wait and not self.aborted.wait(60):
            raise TimeoutError("nobody has ended it")
        return [10 * place for place in places]

    def abort(self, key: str | None = None) -> None:
        """End every `generate` that waits."""
        self.aborted.set()

    def fail(self, kind: str) -> None:
        """Raise, or end, in one of several ways."""
        if kind == "odd exception":
            raise OddSignature(3, text="odd")
        if kind == "memory":
            raise MemoryError("of the actor")
        if kind == "value":
            raise ValueError("of the prompt")
        if kind == "interrupt":
            raise KeyboardInterrupt
        sys.exit(3)


def toys(count: int, timeouts: Timeouts) -> Supervisor:
    """Actors of a class like the engines', under a supervisor."""
    import ray

    make = ray.remote(concurrency_groups={"control": 4}, max_concurrency=8, num_cpus=0, max_restarts=0)(ToyEngine)
    supervisor = Supervisor(lambda index: make.remote(index), count, timeouts, cluster=RayCluster("control"))
    supervisor.start()
    return supervisor


def rolled(
    supervisor: Supervisor, count: int, before: Callable[[int], None] = lambda sent: None, wait: bool = False
) -> Any:
    """Roll out on toys, in groups of two; `before` is called with the number of the group that is about to be sent."""
    sent = 0

    def ask(index: int, group: Group) -> Any:
        nonlocal sent
        sent += 1
        before(sent)
        return supervisor.places[index].actor.generate.remote(group.places, wait)

    groups = [Group((place, place + 1), 2, 2) for place in range(0, count, 2)]
    answers = supervisor.rollout(Spread(groups, (), 1000), ask)
    return [(place, value) for group, answer in answers for place, value in zip(group.places, answer, strict=True)]


def toy_faults() -> dict[str, Any]:
    """Errors as Ray brings them, a process that is killed and one that is stopped, an interrupt."""
    import ray

    patient = Timeouts(init=180, health=180, sync=60, rollout=180, abort=60)
    supervisor = toys(2, patient)
    right = [(place, 10 * place) for place in range(8)]
    errors = {}
    for kind in ("odd exception", "memory", "value", "interrupt", "exit"):
        actor = supervisor.places[0].actor
        try:
            ray.get(actor.fail.remote(kind), timeout=ANSWER_SECONDS)
        except Exception as error:
            fault = fault_of(0, error)
            errors[kind] = [fault.kind, type(fault.error).__name__, str(fault.error)[:300]]
    found: dict[str, Any] = {"errors": errors, "after_exit": rolled(supervisor, 8) == right}

    def at(number: int, harm: Callable[[], None]) -> Callable[[int], None]:
        return lambda sent: harm() if sent == number else None

    def end(place: int, name: str) -> Callable[[], None]:
        return lambda: os.kill(supervisor.places[place].info, getattr(signal, name))

    # The first group goes to engine 0, the second to engine 1: they are asked, and do not answer.
    wait_for_all(supervisor)
    found["killed"] = rolled(supervisor, 8, at(2, end(1, "SIGKILL"))) == right
    wait_for_all(supervisor)
    supervisor.timeouts = Timeouts(init=180, health=8, rollout=180)
    found["stopped"] = rolled(supervisor, 8, at(1, end(0, "SIGSTOP"))) == right
    supervisor.timeouts = patient
    wait_for_all(supervisor)
    # A shell's background processes, and what they start, ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        rolled(supervisor, 8, at(3, lambda: os.kill(os.getpid(), signal.SIGINT)), wait=True)
    except KeyboardInterrupt as error:
        found["interrupted"] = type(error).__name__
    finally:
        signal.signal(signal.SIGINT, before)
    found["left_in_flight"] = len(supervisor._unsettled)
    found["after_interrupt"] = rolled(supervisor, 8) == right
    found["faults"] = [fault.kind for fault in supervisor.faults]
    found["degraded"] = supervisor.degraded
    supervisor.shutdown()
    return found


def wait_for_all(supervisor: Supervisor) -> None:
    """Until every place serves again."""
    deadline = time.monotonic() + 90
    while supervisor.degraded:
        assert time.monotonic() < deadline, supervisor.degraded
        supervisor.revive(wait=True)
        time.sleep(0.05)


def lost_engine(rig: Any) -> dict[str, Any]:
    """`kill -9` of a real engine in a rollout; the one in its place rolls out with the adapter that was sent last."""
    from vllm import SamplingParams

    import trlpatch
    from tests.cpu import tiny

    engines, policy = rig.engines, rig.policy()
    tiny.move(policy, seed=4)
    request = trlpatch.lora_request(policy)
    words = engines.get_tokenizer()
    ids = [{"prompt_token_ids": words(text)["input_ids"]} for text in tiny.prompts(24)]
    before = [info.pid for info in engines.infos]
    submit, sent = engines.submit, 0

    def killing(index: int, one: Any) -> Any:
        nonlocal sent
        sent += 1
        ref = submit(index, one)
        if sent == 4:
            os.kill(engines.infos[1].pid, signal.SIGKILL)
        return ref

    def gaps(tokens: int) -> tuple[list[float], bool]:
        params = SamplingParams(max_tokens=tokens, logprobs=0, ignore_eos=True)
        outputs = engines.generate(ids, params, lora_request=request, use_tqdm=False)
        own = [tiny.trainer_logprobs(policy, out.prompt_token_ids, out.outputs[0].token_ids) for out in outputs]
        order = [list(out.prompt_token_ids) for out in outputs] == [one["prompt_token_ids"] for one in ids]
        return [
            float((tiny.engine_logprobs(out) - one).abs().max()) for out, one in zip(outputs, own, strict=True)
        ], order

    engines.submit = killing
    try:
        during = gaps(16)
    finally:
        del engines.submit
    faults = [fault.kind for fault in engines.supervisor.faults]
    wait_for_all(engines.supervisor)
    version = engines.adapter_version
    after = gaps(4)
    return {
        "faults": faults,
        "gap": max(during[0]),
        "gap_after": max(after[0]),
        "in_order": during[1] and after[1],
        "answers": [len(during[0]), len(after[0])],
        "prompts": len(ids),
        "others": [old != info.pid for old, info in zip(before, engines.infos, strict=True)],
        "versions": [health.version.adapter - version for health in engines.health()],
        "replaced_handle": engines.handles[1] is engines.supervisor.places[1].actor,
    }


def killed_driver() -> dict[str, Any]:
    """`kill -9` of a process that has actors in a cluster that goes on: whether they are gone, and how soon."""
    import ray

    address = ray.get_runtime_context().gcs_address
    code = f"from tests.ray.fault_cases import toys_of_a_driver; toys_of_a_driver({address!r})"
    with tempfile.TemporaryFile("w+") as said:
        driver = subprocess.Popen([sys.executable, "-c", code], stdout=said)
        try:
            pids = told_by(driver, said)
            before = [alive(int(pid)) for pid in pids]
            began = time.monotonic()
        finally:
            driver.kill()
            driver.wait()
    while any(alive(int(pid)) for pid in pids) and time.monotonic() - began < 60:
        time.sleep(0.05)
    return {"before": before, "after": [alive(int(pid)) for pid in pids], "seconds": time.monotonic() - began}


def told_by(driver: subprocess.Popen[bytes], said: IO[str]) -> list[str]:
    """The processes that a driver names once its actors are up.

    Raises:
        AssertionError: it has ended, or is not there in time; it shows its stacks then.
    """
    deadline = time.monotonic() + DRIVER_SECONDS
    while True:
        ended = driver.poll() is not None
        text = os.pread(said.fileno(), 2**16, 0).decode()  # a seek would move where the driver writes
        for line in text.splitlines(keepends=True):
            if line.startswith("pids") and line.endswith("\n"):
                return line.split()[1:]
        if ended or time.monotonic() > deadline:
            if not ended:
                driver.send_signal(signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    driver.wait(10)
            why = f"has ended with status {driver.returncode}" if ended else f"was not up in {DRIVER_SECONDS:g} s"
            raise AssertionError(f"the driver {why}; it said {text!r}")
        time.sleep(0.05)


def toys_of_a_driver(address: str) -> None:
    """Join the cluster, say which processes the actors are, and do nothing more."""
    import ray

    faulthandler.enable()
    ray.init(address=address, log_to_driver=False)
    supervisor = toys(2, Timeouts(init=DRIVER_SECONDS))
    print("pids", *(place.info for place in supervisor.places), flush=True)
    time.sleep(600)


def alive(pid: int) -> bool:
    """Does the process run? One that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
