"""Log-probabilities of given tokens in transformers. Run as a file: `python reference.py QUESTION.json ANSWER.json`.

In a process of its own, so that neither the server nor the caller shares memory, devices or settings with it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

HALVES = {"half": "float16", "float": "float32"}
"""vLLM's other names of dtypes."""

ROOM = 1.5
"""Free device memory over the weights' size that a model is moved to a GPU for."""


def main(asked: str, answer: str) -> None:
    """Answer the question in file `asked`: see `_answer`."""
    question = json.loads(Path(asked).read_text(encoding="utf-8"))
    Path(answer).write_text(json.dumps(_answer(question)), encoding="utf-8")


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return the log-probabilities of the last `scored` tokens of every sequence, one after another, in float32.

    `logprobs` are those of the model, `base` those without its adapter, `rounded` those in the dtype that the server
    computes in, None where that is float32. `other_tokens` is the first text that becomes other tokens here.
    """
    import torch

    model, stored = _load(question)
    tokenizer = _tokenizer(question)
    other = None
    sequences = []
    for one in question["sequences"]:
        prompt, ours = one["prompt"], None if tokenizer is None else tokenizer(one["text"])["input_ids"]
        if prompt is None:
            prompt = ours
        if prompt is None:
            raise SystemExit("this server tells no token ids, and the reference has no tokenizer")
        if other is None and ours is not None and ours != prompt:
            other = one["text"]
        sequences.append(([*prompt, *one["sampled"]], one["scored"]))
    dtype = HALVES.get(question["dtype"], question["dtype"])
    if dtype == "auto":  # vLLM takes half precision for float32 checkpoints
        dtype = "bfloat16" if stored == "float32" else stored
    adapted = question["kind"] == "adapter"
    logprobs = _score(model, sequences)
    base = None
    if adapted:
        with model.disable_adapter():
            base = _score(model, sequences)
    rounded = None
    if dtype != "float32" and question["kind"] != "gguf":
        rounded = _score(model.to(getattr(torch, dtype)), sequences)
    return {"logprobs": logprobs, "base": base, "rounded": rounded, "dtype": dtype, "other_tokens": other}


def _load(question: dict[str, Any]) -> tuple[Any, str]:
    """Return the model in float32, and the dtype that its checkpoint has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(question["path"])
    if question["kind"] == "gguf":
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        stored = "float32"
    else:
        source = question["base"] if question["kind"] == "adapter" else str(path)
        stored = str(getattr(AutoConfig.from_pretrained(source), "dtype", None) or "float32").removeprefix("torch.")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if question["kind"] == "adapter":
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(path))
    model.eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > ROOM * size:
        model.to("cuda")
    return model, stored


def _tokenizer(question: dict[str, Any]) -> Any:
    """The reference's tokenizer, None where it has none."""
    from transformers import AutoTokenizer

    place = question["tokenizer"] or (question["path"] if question["kind"] == "model" else question["base"])
    if place is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        return AutoTokenizer.from_pretrained(place)
    return None


def _score(model: Any, sequences: list[tuple[list[int], int]]) -> list[float]:
    import torch

    found: list[float] = []
    for ids, scored in sequences:
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=model.device)
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, -scored - 1 : -1]
            table = torch.log_softmax(logits.float(), dim=-1)
        found += table.gather(1, inputs[0, -scored:, None]).squeeze(1).tolist()
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
