"""Sleep and wake of one engine on a CUDA device, over and over, by itself: no trainer, no sharing.

    python tests/gpu/sleep_cycles.py --out cycles.json

One engine with LoRA over a random model of 0.1 B parameters. Twenty KV-only sleeps, each with a rollout after the
wake: memory stays flat, log-probabilities of fixed prompts stay the same. Then vLLM's own level 1 on the same engine,
a wake without tags, a wake of weights that never slept, and everything that has to raise. `--graphs` captures CUDA
graphs. Exit status 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.common import milliseconds, random_model, scores, used_gib
from tests.runs.trainers import PROMPTS

CYCLES = 20
FLAT_GIB = 64 / 1024
SAME_NATS = 1e-3


class Run:
    """The engine and what was found so far: name of a check -> (passed, measurement)."""

    def __init__(self, graphs: bool, utilization: float) -> None:
        from vllm import LLM

        from trlpatch.engine import guards
        from trlpatch.engine.state import state_of

        self.llm = LLM(
            model=str(random_model("0.1b")), enable_lora=True, max_lora_rank=8, max_loras=1, enable_sleep_mode=True,
            max_model_len=256, gpu_memory_utilization=utilization, enforce_eager=not graphs, seed=0,
        )  # fmt: skip
        self.state = state_of(self.llm)
        guards.install(self.llm, self.state)
        self.state.shared_weights = True
        self.checks: dict[str, tuple[bool, Any]] = {}
        self.words = self.llm.get_tokenizer()
        self.prompts = [{"prompt_token_ids": self.words(text * 4)["input_ids"]} for text in PROMPTS]

    def check(self, name: str, passed: bool, measured: Any) -> None:
        self.checks[name] = (bool(passed), measured)

    def scores(self) -> list[float]:
        return scores(self.llm, self.words)

    def roll_out(self) -> None:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=32, temperature=1.0, seed=0)
        outputs = self.llm.generate(self.prompts, params, use_tqdm=False)
        assert all(output.outputs[0].token_ids for output in outputs)

    def same(self, name: str) -> None:
        scores = self.scores()
        worst = max(abs(a - b) for a, b in zip(scores, self.first, strict=True))
        self.check(name, worst <= SAME_NATS, f"{worst:.1e} nats")

    def raises(self, name: str, call: Callable[[], Any], error: type[Exception], says: str) -> None:
        try:
            call()
        except error as raised:
            self.check(name, says in str(raised), str(raised)[:100])
        else:
            self.check(name, False, "did not raise")

    # The checks, in order.

    def kv_only_cycles(self) -> dict[str, Any]:
        from trlpatch.engine.memory import cumem
        from trlpatch.engine.sleep import put_to_sleep, wake

        self.roll_out()
        self.first = self.scores()
        memory, freed, slept, woken, worst = [], [], [], [], []
        pool = cumem.pool_bytes("kv_cache") / 2**30
        for _ in range(CYCLES):
            before = used_gib()
            slept.append(milliseconds(lambda: put_to_sleep(self.llm, self.state, 1)))
            freed.append(before - used_gib())
            woken.append(milliseconds(lambda: wake(self.llm, self.state, "kv_cache")))
            self.roll_out()
            worst.append(max(abs(a - b) for a, b in zip(self.scores(), self.first, strict=True)))
            memory.append(used_gib())
        drift = max(memory) - min(memory)
        self.check("memory flat", drift <= FLAT_GIB, f"{1024 * drift:.0f} MiB over {CYCLES} cycles")
        self.check("log-probabilities", max(worst) <= SAME_NATS, f"{max(worst):.1e} nats")
        self.check("the pool is freed", abs(min(freed) - pool) < 0.01, f"{min(freed):.2f} of {pool:.2f} GiB")
        return {"memory_gib": memory, "freed_gib": freed, "kv_sleep_ms": slept, "kv_wake_ms": woken, "worst": worst}

    def by_hand(self) -> None:
        """What a user does with `llm` directly, around a KV-only sleep."""
        from trlpatch.engine.sleep import put_to_sleep
        from trlpatch.errors import EngineAsleep, SharedWeights

        put_to_sleep(self.llm, self.state, 1)
        asleep = used_gib()
        self.raises("generate while asleep", lambda: self.llm.generate(self.prompts[:1], use_tqdm=False), EngineAsleep,
                    "kv_cache unmapped")  # fmt: skip
        self.llm.wake_up(tags=["weights"])
        self.check("waking weights maps nothing", abs(used_gib() - asleep) < 0.01, f"{used_gib() - asleep:.3f} GiB")
        self.llm.wake_up()
        self.same("wake_up() without tags")
        self.raises("sleep(level=1) of shared weights", lambda: self.llm.sleep(level=1), SharedWeights, "level=1")
        self.same("after the refused sleep")

    def not_enough_memory(self) -> None:
        import torch

        from trlpatch.engine.memory import cumem
        from trlpatch.engine.sleep import put_to_sleep, wake
        from trlpatch.errors import NotEnoughMemory

        put_to_sleep(self.llm, self.state, 1)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(free - cumem.pool_bytes("kv_cache") // 2, dtype=torch.uint8, device="cuda")
        asleep = used_gib()
        self.raises("wake without memory", lambda: wake(self.llm, self.state, "kv_cache"), NotEnoughMemory,
                    "GiB are free")  # fmt: skip
        self.check("nothing is left half mapped", abs(used_gib() - asleep) < 0.01, f"{used_gib() - asleep:.3f} GiB")
        del hog
        wake(self.llm, self.state, "kv_cache")
        self.same("woken once there is memory")

    def level_1(self) -> dict[str, Any]:
        from trlpatch.engine.sleep import put_to_sleep, wake

        self.state.shared_weights = False
        slept, woken, freed = [], [], []
        for _ in range(3):
            before = used_gib()
            slept.append(milliseconds(lambda: put_to_sleep(self.llm, self.state, 1)))
            freed.append(before - used_gib())
            woken.append(milliseconds(lambda: [wake(self.llm, self.state, tag) for tag in ("weights", "kv_cache")]))
            self.same("level 1 through trlpatch")
        self.check("it says so", self.state.sleep_method.startswith("level 1"), self.state.sleep_method)
        self.llm.sleep(level=1)
        self.llm.wake_up()
        self.same("level 1 by hand")
        self.state.shared_weights = True
        put_to_sleep(self.llm, self.state, 1)
        self.state.shared_weights = False
        self.llm.sleep(level=1)
        self.llm.wake_up(tags=["weights"])
        self.llm.wake_up(tags=["kv_cache"])
        self.same("level 1 asked while the cache sleeps")
        return {"level_1_sleep_ms": slept, "level_1_wake_ms": woken, "level_1_freed_gib": freed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--graphs", action="store_true", help="capture CUDA graphs (takes longer)")
    parser.add_argument("--utilization", type=float, default=0.15, help="gpu_memory_utilization of the engine")
    arguments = parser.parse_args()
    started = time.monotonic()
    run = Run(arguments.graphs, arguments.utilization)

    import torch
    import vllm

    from trlpatch.engine import probes
    from trlpatch.engine.describe import describe_engines

    found: dict[str, Any] = {
        "vllm": vllm.__version__, "torch": torch.__version__, "device": torch.cuda.get_device_name(),
        "runner": type(probes.executor(run.llm).driver_worker.model_runner).__module__, "graphs": arguments.graphs,
        "built_s": round(time.monotonic() - started, 1),
    }  # fmt: skip
    found |= run.kv_only_cycles()
    run.by_hand()
    run.not_enough_memory()
    found |= run.level_1()
    found["engines"] = describe_engines()
    found["checks"] = {name: {"passed": passed, "measured": what} for name, (passed, what) in run.checks.items()}
    found["seconds"] = round(time.monotonic() - started, 1)
    arguments.out.write_text(json.dumps(found, indent=1))
    for name, (passed, what) in run.checks.items():
        print(f"{'PASS' if passed else 'FAIL'}  {name:40}{what}")
    for name in ("kv_sleep_ms", "kv_wake_ms", "level_1_sleep_ms", "level_1_wake_ms"):
        print(f"      {name:40}median {median(found[name]):.1f}, first {found[name][0]:.1f}")
    print(f"      {found['vllm']}, {found['runner']}, {found['seconds']} s; {found['engines'][0]}")
    return int(not all(passed for passed, _ in run.checks.values()))


if __name__ == "__main__":
    sys.exit(main())
