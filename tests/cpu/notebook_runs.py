"""Run a notebook of examples/notebooks on a tiny model and report what happened.

    python -m tests.cpu.notebook_runs NAME OUT.json

In a process of its own; the TRL release is the one that can be imported. The cells run as they are in the .ipynb; the
parameters below come after the cell with the tag `parameters`, as papermill puts them there.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.cpu.small_grpo import adapter_of
from tests.cpu.tool_calls import CALL, rescored_gap, talking_tokenizer
from tests.cpu.training import count_engines, logged
from tests.processes import ROOT
from tests.words import byte_tokenizer

STEPS = 3
GENERATIONS = 4

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PARAMETERS: dict[str, dict[str, Any]] = {
    "grpo_reasoning": {"SFT_EXAMPLES": 8, "SFT_EPOCHS": 1},
    "grpo_resume": {"STEPS": 4, "SAVE_EVERY": 2},
    "grpo_tools": {"REGEX": CALL, "TURNS": 2, "MAX_COMPLETION_LENGTH": 200},
    "grpo_multi_turn": {"TURNS": 3, "GUESS_LENGTH": 8},
}
"""What a notebook is given beside the parameters of all."""

ON_A_CPU: dict[str, dict[str, Any]] = {"full_finetuning": {"FAST_INFERENCE": False, "ENGINE": {}}}
"""vLLM's CPU backend repacks its weights when it has loaded them and takes none in."""

NOTES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "grpo_reasoning": lambda cells: {"answers": cells["answers"], "sft_steps": cells["sft"].state.global_step},
    "grpo_resume": lambda cells: {"first_run": cells["first_run"]},
    "grpo_tools": lambda cells: {"calls": cells["calls"]},
}
"""What a test asks of a notebook's own names."""


def main(name: str, out: Path) -> None:
    import torch

    cuda = torch.cuda.is_available()
    home = out.parent
    os.chdir(home)
    notebook = json.loads((ROOT / "examples" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    given = parameters(name, home)
    built = count_engines()
    cells = main_module()
    watch = Watch(cells)
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        source = "".join(line for line in cell["source"] if not line.startswith("%"))
        exec(compile(source, f"{name}.ipynb[{number}]", "exec"), cells)
        if "parameters" in cell["metadata"].get("tags", ()):
            cells.update({key: value for key, value in given.items() if key in cells})
            special = {**PARAMETERS.get(name, {}), **(ON_A_CPU.get(name, {}) if not cuda else {})}
            assert special.keys() <= cells.keys(), f"{name} has not all of {sorted(special)}"
            cells.update(special)
    trainer = cells["trainer"]
    outputs = home / "out"
    report = {
        "patched": inspect.getsourcefile(type(trainer)) not in (None, _stock_file(trainer)),
        "engines_built": len(built),
        "rollouts": watch.rollouts,
        "rewards": logged(trainer, "reward") or logged(trainer, "rewards/chosen"),
        "by_function": {
            key: logged(trainer, key)
            for entry in trainer.state.log_history
            for key in entry
            if key.startswith("rewards/") and key.endswith("/mean")
        },
        "steps": trainer.state.global_step,
        "moved": moved(trainer.model, Path(given["MODEL"])),
        "files": sorted(str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.is_file()),
        **NOTES.get(name, lambda _: {})(cells),
    }
    out.write_text(json.dumps(report, indent=1))


def main_module() -> dict[str, Any]:
    """Return the names of a new `__main__`, which is where a notebook's cells run."""
    sys.modules["__main__"] = module = ModuleType("__main__")
    return vars(module)


def parameters(name: str, home: Path) -> dict[str, Any]:
    """Make the tiny model and the data that a notebook runs on; return the parameters of all notebooks."""
    return {
        "MODEL": str(make_model(home, name)),
        "DATASET": str(gsm8k(home / "gsm8k")),
        "OUT": str(home / "out"),
        "MAX_SEQ_LENGTH": 1024,
        "MAX_COMPLETION_LENGTH": 16,
        "RANK": 8,
        "STEPS": STEPS,
        "GENERATIONS": GENERATIONS,
        "BATCH": GENERATIONS,
        "LEARNING_RATE": 1e-2,  # so that an adapter that is a step old shows
        "ENGINE": {"enforce_eager": True, "max_num_seqs": 32},
    }


def make_model(home: Path, name: str) -> Path:
    """Save the tiny model for a notebook, with a tokenizer that has a chat template."""
    words = talking_tokenizer() if name == "grpo_tools" else chat_tokenizer()
    # As in real models, some rows are to spare: transformers 5 loads it as a Qwen2Tokenizer, which adds a token.
    rows = (len(words) // 64 + 1) * 64
    sizes = {"vocab_size": rows, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    model = tiny.checkpoint(home / "model", max_position_embeddings=1024, **sizes)
    words.save_pretrained(model)
    return model


def chat_tokenizer() -> Any:
    """A tokenizer with the chat template of many models."""
    words = byte_tokenizer([CHAT, "<reasoning></reasoning><answer></answer> 0 1 2 3 4 5 6 7 8 9"] * 20, vocabulary=512)
    words.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    words.chat_template = CHAT
    return words


def gsm8k(directory: Path) -> Path:
    """A data set of the form of openai/gsm8k, which `load_dataset(directory, "main")` reads without a hub."""
    (directory / "main").mkdir(parents=True)
    rows = [
        {"question": f"{a} cats and {a + 1} dogs?", "answer": f"{a} + {a + 1} = {2 * a + 1}\n#### {2 * a + 1}"}
        for a in range(1, 17)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "main" / "train.jsonl").write_text(text, encoding="utf-8")
    configs = "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train.jsonl\n"
    (directory / "README.md").write_text(f"---\n{configs}---\n", encoding="utf-8")
    return directory


class Watch:
    """Notes the adapter of every completion that any engine makes, and scores it with the model in training."""

    def __init__(self, cells: dict[str, Any]) -> None:
        import vllm

        self.rollouts: list[dict[str, Any]] = []
        self._cells = cells
        for name in ("generate", "chat"):
            setattr(vllm.LLM, name, self._noting(getattr(vllm.LLM, name)))

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def noting(engine: Any, prompts: Any, sampling_params: Any = None, **named: Any) -> Any:
            if sampling_params is None or isinstance(sampling_params, list):
                return original(engine, prompts, sampling_params=sampling_params, **named)
            if sampling_params.logprobs is None:  # asking changes nothing that is sampled
                sampling_params.logprobs = 0
            outputs = original(engine, prompts, sampling_params=sampling_params, **named)
            trainer = self._cells.get("trainer")
            training = trainer is not None and trainer.is_in_train
            found = {
                "step": trainer.state.global_step if training else None,
                "adapters": sorted({str(adapter_of(output)) for output in outputs}),
                "completions": sum(len(output.outputs) for output in outputs),
                "logprob": float(tiny.engine_logprobs(outputs[0]).sum()),
            }
            if training and _masked(sampling_params):
                generate = functools.partial(type(engine).generate.__wrapped__, engine)
                found["gap"] = rescored_gap(generate, trainer.model, outputs, outputs[0].lora_request)
            elif training:
                found["gap"] = max(_gap(trainer.model, output, sampling_params) for output in outputs)
            self.rollouts.append(found)
            return outputs

        return functools.wraps(original)(noting)


def _masked(params: Any) -> bool:
    """Are the engine's log-probabilities those of some tokens only?"""
    return getattr(params, "structured_outputs", None) is not None or params.min_p > 0 or params.top_p < 1


def _gap(model: Any, output: Any, params: Any) -> float:
    sampled = {"temperature": params.temperature, "top_k": params.top_k}
    return max(
        float((tiny.engine_logprobs(output, i) - scored).abs().max())
        for i, sequence in enumerate(output.outputs)
        for scored in [tiny.trainer_logprobs(model, output.prompt_token_ids, sequence.token_ids, **sampled)]
    )


def moved(model: Any, checkpoint: Path) -> float:
    """The largest change of a trained parameter: from zero (`lora_B`), or from the checkpoint."""
    from transformers import AutoModelForCausalLM

    adapter = [p for name, p in model.named_parameters() if "lora_B" in name]
    if adapter:
        return max(float(parameter.abs().max()) for parameter in adapter)
    before = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    return max(float((p.cpu() - before[name]).abs().max()) for name, p in model.named_parameters())


def _stock_file(trainer: Any) -> str:
    import trl

    return str(Path(trl.__file__).parent / Path(*type(trainer).__module__.split(".")[1:]).with_suffix(".py"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
