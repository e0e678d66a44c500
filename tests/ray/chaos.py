"""Kill, stop and break real engines on Ray actors at random moments of rollouts, and count wrong samples.

    python -m tests.ray.chaos [KILLS] [SEED]        # 30 0; prints a line for each rollout, and the figures as JSON

By hand, with a stack's interpreter (tests/cpu/stack.py) and Ray's folder and a TRL release on PYTHONPATH.

Each rollout has another adapter. Every completion is checked against transformers with that adapter: a prompt without
an answer is lost, an answer to another prompt is wrong, one whose log-probabilities are of other weights is stale.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.ray.rig import cluster

ENGINES = 2
PROMPTS = 24
TOKENS = 60
TOLERANCE = 2e-3
"""Of a sampled token's log-probability; a step of the adapter moves it by more than a tenth."""
HEALTH, ABORT = 30.0, 30.0


def stand_still(llm: Any) -> None:
    """Stop the stepping thread; the actor still answers."""
    time.sleep(1e6)


def run_out_of_memory(llm: Any) -> None:
    """Have the next step fail as a full device does."""

    def step() -> Any:
        raise MemoryError("chaos")

    llm.llm_engine.step = step


def slow_down(llm: Any) -> None:
    """Make every step from now on 60 ms longer."""
    step = llm.llm_engine.step

    def slower() -> Any:
        time.sleep(0.06)
        return step()

    llm.llm_engine.step = slower


class Chaos:
    """One run: a policy, its engines, and the counts."""

    def __init__(self, engines: Any, policy: Any, seed: int) -> None:
        self.engines, self.policy = engines, policy
        self.dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.worst = 0.0
        self.tokenizer = tiny.tokenizer()

    def harm(self, kind: str, index: int) -> None:
        """Do one thing to one engine."""
        place = self.engines.supervisor.places[index]
        if place.state != "serving":
            return
        if kind == "kill -9":
            os.kill(place.info.pid, signal.SIGKILL)
        elif kind == "kill -STOP":
            os.kill(place.info.pid, signal.SIGSTOP)
        else:
            function = {"stands still": stand_still, "out of memory": run_out_of_memory, "slow": slow_down}[kind]
            place.actor.call.remote(function)

    def round(self, kind: str, number: int) -> None:
        """Roll out once, with an adapter of its own, while one thing happens."""
        from vllm import SamplingParams

        import trlpatch
        from trlpatch.errors import RolloutFailed

        tiny.move(self.policy, seed=number)
        prompts = self.prompts()
        params = SamplingParams(max_tokens=TOKENS, temperature=1.0, logprobs=0, ignore_eos=True)
        supervisor = self.engines.supervisor
        faults = len(supervisor.faults)
        places = [place for place in supervisor.places if place.state == "serving" and place.info is not None]
        victim = self.dice.choice(places).index
        timer = threading.Timer(self.dice.uniform(0.0, 1.5), self.harm, (kind, victim))
        interrupt = kind == "interrupt"
        if interrupt:
            timer = threading.Timer(self.dice.uniform(0.1, 1.0), os.kill, (os.getpid(), signal.SIGINT))
        begun = time.monotonic()
        timer.start()
        outcome = "interrupted"
        try:
            request = trlpatch.lora_request(self.policy)
            outputs = self.engines.generate(prompts, params, lora_request=request, use_tqdm=False)
            outcome = "right" if self.judge(prompts, outputs) else "WRONG"
            timer.join()
        except KeyboardInterrupt:
            if not interrupt:
                raise
        except RolloutFailed as error:  # on a busy machine the second engine may be overdue
            outcome = "raised"
            self.counts["raised, two engines lost"] += 1
            print(f"    {error}", flush=True)
        self.kinds[kind] += 1
        self.counts["rollouts"] += 1
        self.seconds.append(time.monotonic() - begun)
        self.counts["replacements begun"] = sum(place.replaced for place in supervisor.places)
        new = "; ".join(str(fault)[:110] for fault in supervisor.faults[faults:])
        print(f"{number:3} {kind:14} engine {victim} {self.seconds[-1]:6.1f} s {outcome:11} {new}", flush=True)

    def prompts(self) -> list[dict[str, Any]]:
        size = self.dice.randint(PROMPTS // 2, PROMPTS)
        return [
            {
                "prompt_token_ids": [
                    self.dice.randrange(5, len(self.tokenizer)) for _ in range(self.dice.randint(4, 20))
                ]
            }
            for _ in range(size)
        ]

    def judge(self, prompts: list[dict[str, Any]], outputs: list[Any]) -> bool:
        """Compare every answer with its prompt and with the policy."""
        before = self.bad()
        self.counts["prompts"] += len(prompts)
        self.counts["lost"] += abs(len(prompts) - len(outputs)) + sum(output is None for output in outputs)
        self.counts["twice"] += len(outputs) - len({id(output) for output in outputs})
        for prompt, output in zip(prompts, outputs, strict=False):
            ids, sampled = prompt["prompt_token_ids"], list(output.outputs[0].token_ids)
            if list(output.prompt_token_ids) != ids or len(sampled) != TOKENS:
                self.counts["of another prompt"] += 1
                continue
            said = [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, sampled, strict=True)]
            off = self.difference(ids, sampled, said)
            self.worst = max(self.worst, off)
            self.counts["of other weights"] += off > TOLERANCE
        return self.bad() == before

    def bad(self) -> int:
        return sum(self.counts[name] for name in ("lost", "twice", "of another prompt", "of other weights"))

    def difference(self, ids: list[int], sampled: list[int], said: list[float]) -> float:
        import torch

        with torch.no_grad():
            logits = self.policy(torch.tensor([ids + sampled])).logits[0, len(ids) - 1 : -1].float()
        own = logits.log_softmax(-1)[range(len(sampled)), sampled]
        return float((own - torch.tensor(said)).abs().max())


LOSSES = ("kill -9", "kill -STOP", "stands still", "out of memory")
KINDS = (*LOSSES, "kill -9", "interrupt", "slow")


def main(kills: int, seed: int) -> int:
    import trlpatch
    import trlpatch.ray
    from trlpatch.ray.timeouts import Timeouts

    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, cluster():
        checkpoint = tiny.checkpoint(Path(folder) / "model")
        limits = Timeouts(init=600, health=HEALTH, sync=60, abort=ABORT)
        engines = trlpatch.ray.create_engines(
            checkpoint, ENGINES, dtype="float32", enforce_eager=True, max_lora_rank=16, max_model_len=128,
            max_num_seqs=4, timeouts=limits,
        )  # fmt: skip
        print(f"{engines} is up after {time.monotonic() - begun:.0f} s", flush=True)
        policy = trlpatch.attach_engine(tiny.policy(checkpoint), engines)
        chaos = Chaos(engines, policy, seed)
        while sum(chaos.kinds[kind] for kind in LOSSES) < kills:
            chaos.round(chaos.dice.choice(KINDS), chaos.counts["rollouts"])
        figures = {
            "kinds": dict(chaos.kinds),
            **chaos.counts,
            "bad samples": chaos.bad(),
            "worst difference of a log-probability": chaos.worst,
            "faults": dict(Counter(fault.kind for fault in engines.supervisor.faults)),
            "engines that serve": len(engines.supervisor.serving()),
            "longest rollout, s": round(max(chaos.seconds), 1),
            "minutes": round((time.monotonic() - begun) / 60, 1),
        }
        print(json.dumps(figures, indent=1))
    return min(1, chaos.bad())


if __name__ == "__main__":
    sys.exit(main(*(int(value) for value in (sys.argv[1:] + ["30", "0"][len(sys.argv) - 1 :]))))
