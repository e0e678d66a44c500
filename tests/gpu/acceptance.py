"""What one engine with LoRA, graphs and sleep must do, measured on a CUDA device: `test_acceptance.py` judges it.

    python tests/gpu/acceptance.py --child MODEL RANK WEIGHTS

One engine per process: vLLM's sleep mode takes no second one.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.common import report, scores, set_adapter, used_gib
from tests.runs.case import TARGETS
from tests.runs.measure import gap
from tests.runs.trainers import PROMPTS

MAX_RANK = 16
CYCLES = 20


class Acceptance:
    """The measurements, in the order of the letters; each leaves the engine awake."""

    def __init__(self, directory: Path, rank: int, weights: str) -> None:
        from trlpatch import FastLanguageModel

        self.base, self.words = FastLanguageModel.from_pretrained(
            str(directory), max_seq_length=256, load_in_4bit=False, gpu_memory_utilization=0.15,
            max_lora_rank=MAX_RANK, enable_sleep_mode=True, share_weights=weights == "shared",
        )  # fmt: skip
        self.engine = self.base.vllm_engine
        self.rank = rank
        self.policy = self._policy()

    def run(self) -> dict[str, Any]:
        names = ("adapter", "disk", "tensors", "storage", "prefix", "cycles", "timings")
        found: dict[str, Any] = {"about": self._about()}
        for name in names:
            started = time.monotonic()
            found[name] = getattr(self, name)()
            found[name]["seconds"] = round(time.monotonic() - started, 1)
            if name == "cycles":
                found["about"] = self._about()
        return found

    def _about(self) -> dict[str, Any]:
        import torch
        import transformers
        import vllm

        from trlpatch.engine import probes
        from trlpatch.engine.state import state_of

        state = state_of(self.engine)
        runner = probes.executor(self.engine).driver_worker.model_runner
        return {
            "vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "runner": f"{type(runner).__module__}", "shared": state.shared_weights,
            "handover": getattr(state.adapter_sync, "description", None),
            "sleep": getattr(state, "sleep_method", None),
        }  # fmt: skip

    def _policy(self) -> Any:
        from trlpatch import FastLanguageModel

        made = FastLanguageModel.get_peft_model(
            self.base,
            r=self.rank,
            lora_alpha=3 * self.rank,
            target_modules=TARGETS,
            use_gradient_checkpointing=False,
        )
        set_adapter(made, seed=1)
        return made

    # A teacher-forced score of fixed sequences. Not bit-identical for equal weights: vLLM's LoRA kernels add with
    # atomics.

    def _scores(self, request: Any) -> list[float]:
        return scores(self.engine, self.words, request)

    def _gap(self, request: Any) -> float:
        """Of sampled tokens, decoded under CUDA graphs."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=24, logprobs=0, temperature=1.0, seed=0)
        outputs = self.engine.generate(PROMPTS, params, lora_request=request, use_tqdm=False)
        return gap(self.policy, outputs)

    # a, e

    def adapter(self) -> dict[str, Any]:
        """Adapter against base, against a zeroed adapter, and against the training model."""
        import torch

        live = self.policy.load_lora()
        with_adapter, base, close = self._scores(live), self._scores(None), self._gap(live)
        with torch.no_grad():
            for name, parameter in self.policy.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        zeroed = self._scores(self.policy.load_lora())
        set_adapter(self.policy, seed=2)
        return {
            "moved": difference(with_adapter, base), "zeroed": difference(zeroed, base),
            "gap": close, "gap_base": self._gap(None), "gap_again": self._gap(self.policy.load_lora()),
        }  # fmt: skip

    # b

    def disk(self) -> dict[str, Any]:
        """Five updates in place, each against a fresh load of the same adapter from disk."""
        differences, gaps = [], []
        for seed in range(5):
            set_adapter(self.policy, seed=10 + seed)
            in_place = self._scores(self.policy.load_lora())
            gaps.append(self._gap(self.policy.load_lora()))
            with tempfile.TemporaryDirectory() as directory:
                self.policy.save_pretrained(directory)
                differences.append(difference(in_place, self._scores(self.policy.load_lora(directory))))
            # The only slot went to the adapter from disk: the live one must come back by itself.
            differences.append(difference(in_place, self._scores(self.policy.load_lora())))
        return {"differences": differences, "gaps": gaps}

    # c

    def tensors(self) -> dict[str, Any]:
        """Are training tensors bit-identical after hand-overs, in float32 and in bfloat16, alpha three times r?"""
        import torch

        changed: dict[str, list[str]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            for name, parameter in self.policy.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(dtype)
            before = {name: parameter.detach().clone() for name, parameter in self.policy.named_parameters()}
            for _ in range(3):
                self._scores(self.policy.load_lora())
                set_adapter(self.policy, seed=3)
                before.update({n: p.detach().clone() for n, p in self.policy.named_parameters() if "lora_" in n})
            self._scores(self.policy.load_lora())
            changed[str(dtype)] = [n for n, p in self.policy.named_parameters() if not torch.equal(before[n], p)]
            changed[f"gap {dtype}"] = [str(self._gap(self.policy.load_lora()))]
        for name, parameter in self.policy.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.float32)
        return {"changed": changed}

    # f

    def storage(self) -> dict[str, Any]:
        """How many base parameters lie inside a parameter of the engine?"""
        from trlpatch.engine import probes

        spans = []
        for parameter in probes.engine_module(self.engine).parameters():
            storage = parameter.untyped_storage()
            spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        base = [(n, p) for n, p in self.policy.named_parameters() if "lora_" not in n]
        outside = [
            name
            for name, parameter in base
            if not any(
                low <= parameter.data_ptr() and parameter.data_ptr() + parameter.nbytes <= high for low, high in spans
            )
        ]
        return {"parameters": len(base), "outside": outside, "used_gib": used_gib()}

    # g

    def prefix(self) -> dict[str, Any]:
        """The first token after a long cached prompt, before and after an update, against the training model."""
        from vllm import SamplingParams

        prompt = {"prompt_token_ids": self.words(" ".join(PROMPTS[:6]))["input_ids"][:128]}
        params = SamplingParams(max_tokens=1, logprobs=0, temperature=1.0, seed=0)
        gaps, cached = [], []
        for seed in range(4):
            for _ in range(2):  # the second one finds the prompt in the prefix cache
                outputs = self.engine.generate([prompt], params, lora_request=self.policy.load_lora(), use_tqdm=False)
                gaps.append(gap(self.policy, outputs))
                cached.append(outputs[0].num_cached_tokens)
            set_adapter(self.policy, seed=20 + seed)
        return {"gaps": gaps, "cached": cached, "prompt": len(prompt["prompt_token_ids"])}

    # d

    def cycles(self) -> dict[str, Any]:
        """Sleep, an update while asleep, wake, score: twenty times."""
        from trlpatch.engine.memory import sleep as pools
        from trlpatch.engine.state import state_of

        state = state_of(self.engine)
        still = [self._scores(self.policy.load_lora())]
        memory, differences, gaps, freed, slept, woken = [], [], [], [], [], []
        for cycle in range(CYCLES):
            before = used_gib()
            started = time.perf_counter()
            pools.put_to_sleep(self.engine, state, 1)
            slept.append(1e3 * (time.perf_counter() - started))
            freed.append(before - used_gib())
            if cycle % 2:
                set_adapter(self.policy, seed=100 + cycle)
            started = time.perf_counter()
            request = self.policy.load_lora()  # wakes
            woken.append(1e3 * (time.perf_counter() - started))
            scores = self._scores(request)
            if not cycle % 2:
                differences.append(difference(scores, still[-1]))
            still.append(scores)
            gaps.append(self._gap(request))
            memory.append(used_gib())
        return {
            "memory": memory, "differences": differences, "gaps": gaps, "freed": freed,
            "sleep_ms": median(slept), "wake_ms": median(woken),
        }  # fmt: skip

    # h

    def timings(self) -> dict[str, Any]:
        """Milliseconds of one hand-over: in place, and registering anew."""
        import torch

        from trlpatch.engine.adapter_sync.publisher import Registration
        from trlpatch.engine.state import state_of

        state = state_of(self.engine)

        seeds = itertools.count(1000)

        def one() -> float:
            set_adapter(self.policy, seed=next(seeds))
            torch.cuda.synchronize()
            started = time.perf_counter()
            self.policy.load_lora()
            torch.cuda.synchronize()
            return 1e3 * (time.perf_counter() - started)

        in_place = [one() for _ in range(20)]
        state.adapter_sync, state.published = Registration(self.engine), None
        anew = [one() for _ in range(10)]
        state.adapter_sync = state.published = None
        return {"in_place_ms": median(in_place[5:]), "anew_ms": median(anew[3:])}


def difference(one: list[float], other: list[float]) -> float:
    return mean(abs(a - b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    report(Acceptance(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]).run())
