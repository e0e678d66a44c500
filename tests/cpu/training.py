"""Train for a few steps in a process of its own and report what happened.

    python -m tests.cpu.training CASE OUT.json

The TRL release is the one that can be imported. One vLLM engine per process is all that the CPU backend takes.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import argparse
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.stock import hide_vllm, import_package_table, supply_vllm_names, supply_warnings_issued
from trlpatch.engine.state import state_of
from trlpatch.source.locate import find_trl

ALGORITHMS = ("grpo", "rloo")
CASES = ("attached", "limited", "own", "patched", "stock")
CONTROL_STEPS = 4
MAX_COMPLETION = 16
STOP = 6  # a token id that a rollout may sample
PATTERN = "[0-9]{3} [a-f]{2}"
PROMPT_LIMIT = 3  # tokens; every prompt has more

COMMON: dict[str, Any] = {
    "learning_rate": 1.5e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "beta": 0.0,
    "seed": 0,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
"""Fields of every trainer's config that a run does not set itself."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="grpo")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = Run(arguments.algorithm, arguments.steps, Path(directory))
        report = {
            "attached": run.attached,
            "limited": run.limited,
            "own": run.own_engine,
            "patched": run.patched,
            "stock": run.stock,
        }
        arguments.out.write_text(json.dumps(report[arguments.case](), indent=1))


class Run:
    """The cases, each used once per process."""

    def __init__(self, algorithm: str, steps: int, directory: Path) -> None:
        self.algorithm = algorithm
        self.steps = steps
        self.directory = directory
        self.model = tiny.checkpoint(directory / "model")

    def attached(self) -> dict[str, Any]:
        """LoRA on an attached engine, then a control on the same engine with the request left out of every rollout."""
        import trlpatch

        report = trlpatch.PatchFastRL(self.algorithm)
        engine = tiny.engine(self.model)
        built = count_engines()
        policy = trlpatch.attach_engine(tiny.policy(self.model), engine)
        # Up to 0.23 TRL ends a completion at EOS only: it would train on the padding behind any other stop token.
        stop = STOP if find_trl().release >= (0, 24) else engine.get_tokenizer().eos_token_id
        params = trlpatch.vLLMSamplingParams(stop_token_ids=[stop])
        trainer = self._trainer(policy, self.steps, vllm_sampling_params=params)
        recorder = Recorder(trainer, engine)
        trainer.train()
        recorder.close()
        control = self._control(engine)
        return {
            **self._about(report),
            "engines_built": len(built),
            "uses_attached": engine_of(trainer) is engine,
            "use_vllm": trainer.args.use_vllm,
            "mode": getattr(trainer.args, "vllm_mode", None),
            "sleep": getattr(trainer.args, "vllm_enable_sleep_mode", None),
            "stop": stop,
            "rollouts": recorder.rollouts,
            "control": control,
            "rewards": logged(trainer, "reward"),
            "witness": logged(trainer, "sampling/sampling_logp_difference/max"),
        }

    def _control(self, engine: Any) -> list[dict[str, Any]]:
        import trlpatch
        import trlpatch.hooks

        injected = trlpatch.hooks.lora_request
        trlpatch.hooks.lora_request = lambda *_: None
        try:
            policy = trlpatch.attach_engine(tiny.policy(self.model), engine)
            trainer = self._trainer(policy, CONTROL_STEPS)
            state_of(engine).bare_request = None
            recorder = Recorder(trainer, engine)
            trainer.train()
            recorder.close()
            return recorder.rollouts
        finally:
            trlpatch.hooks.lora_request = injected

    def limited(self) -> dict[str, Any]:
        """LoRA on an attached engine, with a regular expression for completions and a limit on prompts."""
        import trlpatch

        report = trlpatch.PatchFastRL(self.algorithm, compat="on")
        engine = tiny.engine(self.model)
        policy = trlpatch.attach_engine(tiny.policy(self.model), engine)
        regex = {"vllm_guided_decoding_regex": PATTERN, "vllm_structured_outputs_regex": PATTERN}
        # Older releases leave prompts to the engine, whose tokenizer transformers 5 makes a Qwen2Tokenizer: it splits
        # numbers, which ours does not.
        words = engine.get_tokenizer()
        trainer = self._trainer(policy, self.steps, words, **regex, max_prompt_length=PROMPT_LIMIT)
        recorder = Recorder(trainer, engine)
        trainer.train()
        recorder.close()
        return {
            **self._about(report),
            "rollouts": recorder.rollouts,
            "full_prompts": [words(text)["input_ids"] for text in tiny.dataset(32)["prompt"]],
        }

    def own_engine(self) -> dict[str, Any]:
        """LoRA on the engine that TRL builds itself, from its own arguments and the ones that trlpatch adds."""
        import trlpatch

        report = trlpatch.PatchFastRL(self.algorithm)
        built = count_engines()
        # Up to 0.25 the context length is the prompt's limit and the completion's.
        length = {"vllm_max_model_length": 128} if find_trl().release >= (0, 26) else {"max_prompt_length": 64}
        settings = {"vllm_mode": "colocate", "use_vllm": True, **length}
        if find_trl().release < (0, 20):  # these leave it to a launcher
            rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
            os.environ.update({**rank, **os.environ})
        trainer = self._trainer(tiny.policy(self.model), self.steps, **settings)
        engine = engine_of(trainer)
        recorder = Recorder(trainer, engine)
        trainer.train()
        recorder.close()
        return {**self._about(report), "engines_built": len(built), "built_with": built, "rollouts": recorder.rollouts}

    def patched(self) -> dict[str, Any]:
        """No engine: transformers generates; with the patches."""
        import trlpatch

        hide_vllm()
        return {**self._about(trlpatch.PatchFastRL(self.algorithm)), **self._without_engine()}

    def stock(self) -> dict[str, Any]:
        """No engine: transformers generates; TRL as it is."""
        hide_vllm()
        supply_vllm_names()
        import_package_table()
        return {**self._about(None), **self._without_engine(supply_warnings_issued)}

    def _without_engine(self, prepare: Callable[[Any], None] | None = None) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        found: dict[str, Any] = {}
        for name in ("full", "lora"):
            torch.manual_seed(0)
            model = tiny.policy(self.model) if name == "lora" else AutoModelForCausalLM.from_pretrained(self.model)
            if prepare is not None:
                prepare(model)
            trainer = self._trainer(model, self.steps, learning_rate=1e-3)
            losses = record_losses(trainer)
            trainer.train()
            digest = hashlib.sha256()
            for _, parameter in sorted(trainer.model.named_parameters()):
                digest.update(parameter.detach().contiguous().numpy().tobytes())
            found[name] = {"losses": losses, "rewards": logged(trainer, "reward"), "weights": digest.hexdigest()}
        return found

    def _about(self, report: Any) -> dict[str, Any]:
        import trl

        module = importlib.import_module(f"trl.trainer.{self.algorithm}_trainer")
        return {"trl": trl.__version__, "file": module.__file__, "patched": report is not None}

    def _trainer(self, model: Any, steps: int, words: Any = None, **changes: Any) -> Any:
        import transformers
        import trl

        name = {"grpo": "GRPO", "rloo": "RLOO"}[self.algorithm]
        settings: dict[str, Any] = {
            "output_dir": str(self.directory / "out"),
            "per_device_train_batch_size": 32,
            "num_generations": 8,
            "max_completion_length": MAX_COMPLETION,
            "max_steps": steps,
            "lr_scheduler_type": "linear",
            **changes,
        }
        trainer = getattr(trl, f"{name}Trainer")(
            model=model,
            args=configured(getattr(trl, f"{name}Config"), settings),
            reward_funcs=odd_tokens,
            train_dataset=tiny.dataset(32),
            processing_class=words or tiny.tokenizer(),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer


def configured(cls: Any, settings: dict[str, Any]) -> Any:
    """Build the config `cls` from `settings` over `COMMON`, with the fields that this TRL release has."""
    known = cls.__dataclass_fields__
    return cls(**{name: value for name, value in {**COMMON, **settings}.items() if name in known})


def engine_of(trainer: Any) -> Any:
    """Where TRL keeps it: on the trainer up to 0.27, in its VLLMGeneration from 0.28."""
    return getattr(trainer, "llm", None) or trainer.vllm_generation.llm


def _short(output: Any) -> bool:
    return len(output.outputs[0].token_ids) < MAX_COMPLETION


def odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward the share of tokens with an odd id: one half for a model that knows nothing."""
    return [sum(token % 2 for token in ids) / max(len(ids), 1) for ids in completion_ids]


class Recorder:
    """Watches an engine's rollouts and scores each with the training model at the moment it happens."""

    def __init__(self, trainer: Any, engine: Any) -> None:
        self.rollouts: list[dict[str, Any]] = []
        self._trainer = trainer
        self._engine = engine
        self._generate, self._chat = engine.generate, engine.chat
        engine.generate, engine.chat = self, self._talk

    def __call__(self, prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        return self._record("generate", self._generate, prompts, sampling_params, kwargs)

    def _talk(self, messages: Any, sampling_params: Any, **kwargs: Any) -> Any:
        return self._record("chat", self._chat, messages, sampling_params, kwargs)

    def _record(self, kind: str, roll_out: Any, prompts: Any, sampling_params: Any, kwargs: dict[str, Any]) -> Any:
        if sampling_params.logprobs is None:  # RLOO and OnlineDPO do not ask; asking changes nothing that is sampled
            sampling_params.logprobs = 0
        outputs = roll_out(prompts, sampling_params=sampling_params, **kwargs)
        request = kwargs.get("lora_request")
        gaps = [self._gap(output, i, sampling_params) for output in outputs for i in range(len(output.outputs))]
        completions = [sequence.token_ids for output in outputs for sequence in output.outputs]
        self.rollouts.append(
            {
                "step": self._trainer.state.global_step,
                "kind": kind,
                "mode": "train" if self._trainer.model.training else "eval",
                "adapter": None if request is None else request.lora_name,
                "gap": max(gaps),
                "odd": sum(odd_tokens(completions)) / len(completions),
                "last_tokens": sorted({output.outputs[0].token_ids[-1] for output in outputs if _short(output)}),
                "stop_token_ids": list(sampling_params.stop_token_ids),
                "max_tokens": sampling_params.max_tokens,
                "texts": sorted({output.outputs[0].text for output in outputs}),
                "prompts": sorted({tuple(output.prompt_token_ids) for output in outputs}),
            }
        )
        return outputs

    def _gap(self, output: Any, index: int, params: Any) -> float:
        """Largest difference of a token's log-probability between the engine and the training model."""
        prompt, completion = output.prompt_token_ids, output.outputs[index].token_ids
        sampled = {"temperature": params.temperature, "top_k": params.top_k}
        theirs = tiny.trainer_logprobs(self._trainer.model, prompt, completion, **sampled)
        return float((tiny.engine_logprobs(output, index) - theirs).abs().max())

    def close(self) -> None:
        self._engine.generate, self._engine.chat = self._generate, self._chat


def count_engines() -> list[dict[str, Any]]:
    """From now on note the keyword arguments of every engine that is built."""
    import vllm

    built: list[dict[str, Any]] = []
    construct = vllm.LLM.__init__

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        built.append({name: kwargs[name] for name in kwargs if isinstance(kwargs[name], (str, int, float, bool))})
        construct(self, *args, **kwargs)

    vllm.LLM.__init__ = counting
    return built


def record_losses(trainer: Any) -> list[str]:
    """Every loss to the last bit (the trainer's log rounds them)."""
    losses: list[str] = []
    compute = trainer.compute_loss

    def recording(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()).hex())
        return loss

    trainer.compute_loss = recording
    return losses


def logged(trainer: Any, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


if __name__ == "__main__":
    main()
