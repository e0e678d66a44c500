"""Short real runs on one CUDA device: is the policy in every rollout, over sleep, evaluation and accumulation?

    python tests/gpu/check_core.py --trl-root DIR --out core.json lora:0.28.0,1.9.2 full:1.9.2 stock-full:1.9.2

DIR holds unpacked TRL releases, one folder each. Every case runs in a process of its own, one engine at a time, on a
random-weight Qwen2. Measured is the difference between the log-probability that the engine reports for a sampled
token and the one that the training model gives it at that moment: the level of rounding if the policy rolls out, far
above it if anything else does. Six steps of two accumulated micro-batches, then an evaluation of three batches. Cases:

    lora         GRPO, LoRA, attached engine built with sleep; the control leaves the adapter out of every request
    own          GRPO, LoRA, TRL builds the engine, with sleep
    full         GRPO, all weights, TRL builds the engine, vllm_enable_sleep_mode=True
    stock-full   the same without trlpatch
    rloo         as lora, with RLOOTrainer
    online_dpo   OnlineDPO, LoRA, attached engine built with sleep; no evaluation
    online_dpo-full, stock-online_dpo-full   OnlineDPO, all weights, TRL builds the engine, sleep where it has it
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.common import (
    DRIFT,
    PROMPTS,
    TARGETS,
    TOLERANCE,
    odd_tokens,
    random_model,
    report,
    run_child,
    watch_rollouts,
)

STEPS = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE:RELEASE,RELEASE")
    parser.add_argument("--trl-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timeout", type=int, default=150, help="seconds a case")
    parser.add_argument("--budget", type=int, default=540, help="seconds after which no case is started")
    arguments = parser.parse_args()
    started, results = time.monotonic(), []
    model = random_model("0.1b")
    columns = f"{'gap first':>10}{'gap last':>10}{'gap max':>10}{'control':>9}"
    print(f"{'case':22}{'TRL':8}{'ok':6}{columns}  notes", flush=True)
    for case, _, releases in (item.partition(":") for item in arguments.cases):
        for release in releases.split(","):
            if time.monotonic() - started > arguments.budget:
                result: dict[str, Any] = {"error": "left out: no time"}
            else:
                result = run_child(
                    Path(__file__), [str(model), case], trl=arguments.trl_root / release, timeout=arguments.timeout
                )
            result = {"case": case, "trl": release, **result}
            result["verdict"] = verdict(result)
            results.append(result)
            print(row(result), flush=True)
            arguments.out.write_text(json.dumps(results, indent=1))
    return int(any(result["verdict"] == "FAIL" for result in results))


def verdict(result: dict[str, Any]) -> str:
    if result["case"].startswith("stock"):
        return "-"
    if "error" in result or result["engines"] != 1 or result["reloads"] or max(result["gaps"]) > TOLERANCE:
        return "FAIL"
    return "FAIL" if "control" in result and result["control"][-1] < DRIFT else "PASS"


def row(result: dict[str, Any]) -> str:
    head = f"{result['case']:22}{result['trl']:8}{result['verdict']:6}"
    if "error" in result:
        return f"{head}{result['error'][-300:]}"
    gaps = result["gaps"]
    control = f"{result['control'][-1]:9.3f}" if "control" in result else f"{'':9}"
    notes = f"{len(gaps)} rollouts, sleeps {result['sleeps']}, wakes {result['wakes']}, reloads {result['reloads']}"
    notes += f", evals {result['eval_rollouts']}, {result['seconds']:.0f} s"
    return f"{head}{gaps[0]:10.4f}{gaps[-1]:10.4f}{max(gaps):10.4f}{control}  {notes}"


# In the child.


class Case:
    """One run in this process."""

    def __init__(self, name: str, model: Path) -> None:
        self.model = model
        self.full = name.endswith("full")
        self.stock = name.startswith("stock")
        self.attached = not self.full and name != "own"
        kind = name.removeprefix("stock-").removesuffix("full").rstrip("-")
        self.algorithm = kind if kind in ("rloo", "online_dpo") else "grpo"
        self.counts: dict[str, Any] = {"engines": 0, "sleeps": "", "wakes": 0, "reloads": 0}

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        self._watch_engines()
        if not self.stock:
            import trlpatch

            trlpatch.PatchFastRL(self.algorithm)
        trainer, gaps = self._train(None)
        trained = len(gaps)
        if self.algorithm != "online_dpo":
            trainer.evaluate()
        result = {**self.counts, "gaps": list(gaps), "eval_rollouts": len(gaps) - trained}
        if self.attached:
            import trlpatch.hooks

            live = trlpatch.hooks.lora_request
            # The hook also wakes the engine; only what it returns is left out.
            trlpatch.hooks.lora_request = lambda *given: live(*given) and None
            result["control"] = list(self._train(trainer.model.vllm_engine)[1])
        return result | {"seconds": time.monotonic() - started}

    def _watch_engines(self) -> None:
        """Count what is asked of vLLM, and give old TRL releases the names that vLLM has dropped since."""
        import importlib.metadata

        import vllm
        import vllm.sampling_params

        counts, llm = self.counts, vllm.LLM
        construct, sleep, wake, remote = llm.__init__, llm.sleep, llm.wake_up, llm.collective_rpc

        def counted(engine: Any, *args: Any, **kwargs: Any) -> None:
            counts["engines"] += 1
            construct(engine, *args, **{"enforce_eager": True, **kwargs})

        def slept(engine: Any, level: int = 1, **kwargs: Any) -> Any:
            counts["sleeps"] += str(level)
            return sleep(engine, level=level, **kwargs)

        def woken(engine: Any, *args: Any, **kwargs: Any) -> Any:
            counts["wakes"] += 1
            return wake(engine, *args, **kwargs)

        def called(engine: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            counts["reloads"] += method == "reload_weights"
            return remote(engine, method, *args, **kwargs)

        llm.__init__, llm.sleep, llm.wake_up, llm.collective_rpc = counted, slept, woken, called
        old = tuple(map(int, importlib.metadata.version("trl").split(".")[:2])) < (0, 27)
        if old and not hasattr(vllm.sampling_params, "GuidedDecodingParams"):
            self._old_names(vllm)

    @staticmethod
    def _old_names(vllm: Any) -> None:
        import types

        params = vllm.SamplingParams

        class Params:
            def __call__(self, *args: Any, guided_decoding: Any = None, **kwargs: Any) -> Any:
                kwargs.pop("truncate_prompt_tokens", None)
                return params(*args, **kwargs)

            def __getattr__(self, name: str) -> Any:
                return getattr(params, name)

        vllm.sampling_params.GuidedDecodingParams = vllm.sampling_params.StructuredOutputsParams
        vllm.SamplingParams = Params()
        try:
            import vllm.transformers_utils.tokenizer
        except ImportError:
            import vllm.transformers_utils

            tokenizer = types.ModuleType("vllm.transformers_utils.tokenizer")
            tokenizer.get_cached_tokenizer = lambda tokenizer: tokenizer  # type: ignore[attr-defined]
            sys.modules["vllm.transformers_utils.tokenizer"] = tokenizer
            vllm.transformers_utils.tokenizer = tokenizer

    def _train(self, engine: Any) -> tuple[Any, list[float]]:
        import torch
        from datasets import Dataset
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        policy = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16)
        if not self.full:
            settings = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
            policy = get_peft_model(policy, settings)
        if self.attached:
            import trlpatch

            if engine is None:
                engine = self._engine()
            else:
                engine.wake_up()
            trlpatch.attach_engine(policy, engine)
        data = Dataset.from_dict({"prompt": PROMPTS})
        trainer_class, config_class = self._classes()
        trainer = trainer_class(
            model=policy, args=self._config(config_class), train_dataset=data, eval_dataset=data.select(range(3)),
            processing_class=AutoTokenizer.from_pretrained(self.model), reward_funcs=odd_tokens,
        )  # fmt: skip
        gaps: list[float] = []
        watch_rollouts(trainer, (getattr(trainer, "vllm_generation", None) or trainer).llm, gaps)
        trainer.train()
        return trainer, gaps

    def _classes(self) -> tuple[Any, Any]:
        import trl

        if self.algorithm == "online_dpo":
            try:
                from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
            except ImportError:
                from trl import OnlineDPOConfig, OnlineDPOTrainer
            return OnlineDPOTrainer, OnlineDPOConfig
        name = {"grpo": "GRPO", "rloo": "RLOO"}[self.algorithm]
        return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")

    def _config(self, cls: Any) -> Any:
        online = self.algorithm == "online_dpo"
        settings = {
            "output_dir": "/tmp/trlpatch-gpu-out", "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 1e-4 if self.full else 2e-3,
            "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 0, "report_to": [], "save_strategy": "no",
            "bf16": True, "gradient_checkpointing": False, "disable_tqdm": True, "beta": 0.1 if online else 0.0,
            "vllm_gpu_memory_utilization": 0.15, "num_generations": 2 if online else 8, "steps_per_generation": 1,
            "max_new_tokens" if online else "max_completion_length": 24, "max_length": 128, "max_prompt_length": 64,
            "use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "temperature": 1.0,
            "vllm_importance_sampling_correction": False,
        }  # fmt: skip
        known = cls.__dataclass_fields__
        return cls(**{name: value for name, value in settings.items() if name in known})

    def _engine(self) -> Any:
        from vllm import LLM

        return LLM(
            model=str(self.model), enable_lora=True, max_lora_rank=8, max_loras=1, enable_sleep_mode=True,
            max_model_len=256, gpu_memory_utilization=0.15, logprobs_mode="processed_logprobs", seed=0,
        )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        report(Case(sys.argv[3], Path(sys.argv[2])).run())
    else:
        sys.exit(main())
