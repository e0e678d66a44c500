"""GRPO with images on a tiny vision-language model, and what its rollouts are sampled from.

    python -m tests.cpu.vision_training grpo|kinds OUT.json

In a process of its own, with torchvision on PYTHONPATH; the TRL release is the one that can be imported.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cpu import tiny_vision
from tests.cpu.small_grpo import adapter_of, small_grpo
from tests.cpu.training import engine_of, logged
from trlpatch import FastVisionModel
from trlpatch.source.locate import find_trl

LOADED: dict[str, Any] = {"max_seq_length": 256, "load_in_4bit": False, "enforce_eager": True, "max_num_seqs": 16}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"enable_tower_connector_lora": True},
    "qwen3_vl": {},
    # transformers 5.23 refuses a text with image tokens and no image, which is how vLLM 0.28 fills this cache.
    "gemma3": {"mm_processor_cache_gb": 0},
}
STEPS = 2
RLOO_SINCE = (0, 24)
"""The release from which RLOOTrainer takes images."""


def grpo(directory: Path) -> dict[str, Any]:
    """Train for two steps on the engine of `from_pretrained`; score its rollouts, then one with other pixels.

    Then a step of RLOO with what was trained, where this release has it.
    """
    model, processor = FastVisionModel.from_pretrained(str(tiny_vision.checkpoint(directory / "model")), **LOADED)
    from trl import GRPOConfig, GRPOTrainer  # noqa: F401  # patched: the model was loaded with an engine

    model = FastVisionModel.get_peft_model(model, r=8, lora_alpha=16, finetune_vision_layers=False)
    settings = {
        "max_steps": STEPS,
        "learning_rate": 1.5e-2,
        "max_prompt_length": None,
        "max_completion_length": 8,
        "generation_kwargs": {"allowed_token_ids": tiny_vision.ordinary(processor.tokenizer)},
    }
    given = {"train_dataset": tiny_vision.dataset(16), "processing_class": processor}
    trainer = small_grpo(model, directory, config=settings, **given)
    watch = Watch(trainer, processor)
    trainer.train()
    watch.close()
    found = {
        "uses_ours": engine_of(trainer) is model.vllm_engine,
        "rollouts": watch.rollouts,
        "adapted": adapted(model),
        "rewards": logged(trainer, "reward"),
        "witness": logged(trainer, "sampling/sampling_logp_difference/max"),
        **score(model, processor),
        "exports": exports(model, processor, directory),
    }
    if find_trl().release < RLOO_SINCE:
        return found
    trainer = small_grpo(model, directory, kind="RLOO", config={**settings, "max_steps": 1}, **given)
    watch = Watch(trainer, processor)
    trainer.train()
    watch.close()
    return {**found, "rloo": {"uses_ours": engine_of(trainer) is model.vllm_engine, "rollouts": watch.rollouts}}


def exports(model: Any, processor: Any, directory: Path) -> dict[str, Any]:
    """Largest difference of log-probabilities between the policy and its exports, loaded anew with their processors.

    Of the live policy, of it without naming its processor, of its adapter, of the base alone; and what GGUF says.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from trlpatch.errors import CannotExport
    from trlpatch.export import save_pretrained_merged

    def logps(one: Any, processor: Any) -> Any:
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat"}]}], tokenize=False
        )
        inputs = processor(text=[text], images=tiny_vision.images("red"), return_tensors="pt")
        with torch.no_grad():
            return torch.log_softmax(one.eval()(**inputs).logits.float(), dim=-1)

    import torch

    wanted = logps(model, processor)
    found: dict[str, Any] = {}
    model.save_pretrained_merged(directory / "adapter", save_method="lora", tokenizer=processor)
    for name, source, given in (
        ("live", model, processor),
        ("unnamed", model, None),
        ("adapter", directory / "adapter", None),
        ("base", directory / "model", None),
    ):
        merged = directory / f"merged-{name}"
        save_pretrained_merged(source, merged, given, dtype="float32", verify=False)
        again = AutoModelForImageTextToText.from_pretrained(merged)
        found[name] = float((logps(again, AutoProcessor.from_pretrained(merged)) - wanted).abs().max())
    try:
        model.save_pretrained_gguf(directory / "gguf", processor, "f16")
        found["gguf"] = "written"
    except CannotExport as error:
        found["gguf"] = str(error)
    return found


def kinds(directory: Path) -> dict[str, Any]:
    """Each kind of model with an adapter that has moved: one rollout after another, no training."""
    found = {}
    for kind, engine in KINDS.items():
        place = tiny_vision.checkpoint(directory / kind, kind)
        model, processor = FastVisionModel.from_pretrained(str(place), **LOADED, **engine)
        model = FastVisionModel.get_peft_model(model, r=8, lora_alpha=16)
        tiny.move(model, seed=1)
        found[kind] = {"adapted": adapted(model), **score(model, processor)}
        del model
    return found


def adapted(model: Any) -> list[str]:
    """Paths of the modules with an adapter in the transformers model, layers left out, each once."""
    return sorted(
        {
            name.removeprefix("base_model.model.").split(".lora_A")[0].replace(".1.", ".0.")
            for name, _ in model.named_parameters()
            if "lora_A" in name
        }
    )


def score(model: Any, processor: Any) -> dict[str, float]:
    """Largest differences of log-probabilities between the engine and the model with a red square.

    With the live adapter, without it, and with a blue square for the engine.
    """
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    red, blue = tiny_vision.images("red", "blue")
    return {
        "gap": difference(model, processor, rolled_out(model, processor, text, red), text, red),
        "gap_without_adapter": difference(
            model, processor, rolled_out(model, processor, text, red, lora_request=None), text, red
        ),
        "gap_of_other_image": difference(model, processor, rolled_out(model, processor, text, blue), text, red),
    }


def rolled_out(model: Any, processor: Any, text: str, image: Any, **request: Any) -> Any:
    """One greedy completion of the text and the image."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=6, temperature=0.0, logprobs=0, allowed_token_ids=tiny_vision.ordinary(processor.tokenizer)
    )
    prompt = {"prompt_token_ids": processor.tokenizer(text)["input_ids"], "multi_modal_data": {"image": image}}
    (output,) = model.fast_generate([prompt], sampling_params=params, use_tqdm=False, **request)
    return output


def difference(model: Any, processor: Any, output: Any, text: str, image: Any, *, temperature: float = 1.0) -> float:
    """Largest difference of a token's log-probability between the engine and the model shown `image`."""
    import torch

    inputs = processor(text=[text], images=[image], return_tensors="pt")
    prompt, completion = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    assert inputs["input_ids"][0].tolist() == prompt, (inputs["input_ids"][0].tolist(), prompt)
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in pixels:
            pixels[name] = torch.cat([pixels[name], torch.zeros(1, len(completion), dtype=torch.long)], dim=1)
    ids = torch.tensor([prompt + completion])
    allowed = torch.tensor(tiny_vision.ordinary(processor.tokenizer))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0, len(prompt) - 1 : -1]
    model.train(was_training)
    masked = torch.full_like(logits, float("-inf")).index_copy(1, allowed, logits[:, allowed])
    scored = torch.log_softmax(masked.float() / temperature, dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return float((tiny.engine_logprobs(output) - scored).abs().max())


class Watch:
    """Scores the first completion of every rollout that a trainer makes, with the image that it sent."""

    def __init__(self, trainer: Any, processor: Any) -> None:
        self.rollouts: list[dict[str, Any]] = []
        self._trainer, self._processor, self._engine = trainer, processor, engine_of(trainer)
        self._calls = {name: getattr(self._engine, name) for name in ("generate", "chat")}
        for name in self._calls:
            setattr(self._engine, name, lambda prompts, name=name, **kwargs: self._record(name, prompts, kwargs))

    def _record(self, name: str, prompts: Any, kwargs: dict[str, Any]) -> Any:
        params = kwargs["sampling_params"]
        params.logprobs = params.logprobs or 0
        outputs = self._calls[name](prompts, **kwargs)
        image = _image_of(prompts[0])
        text = self._processor.tokenizer.decode(self._unexpanded(outputs[0].prompt_token_ids))

        def gap(shown: Any) -> float:
            given = (self._trainer.model, self._processor, outputs[0], text, shown)
            return difference(*given, temperature=params.temperature)

        (other,) = tiny_vision.images("red" if image.getpixel((0, 0)) != tiny_vision.COLOURS["red"] else "blue")
        said = {"call": name, "adapter": adapter_of(outputs[0])}
        with self._trainer.model.disable_adapter():
            control = gap(image)
        self.rollouts.append({**said, "gap": gap(image), "of_other_image": gap(other), "without_adapter": control})
        return outputs

    def _unexpanded(self, ids: list[int]) -> list[int]:
        """The prompt with one image token, which the processor puts as many in place of as the image needs."""
        pad = self._processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return [token for i, token in enumerate(ids) if token != pad or ids[i - 1] != pad]

    def close(self) -> None:
        for name, call in self._calls.items():
            setattr(self._engine, name, call)


def _image_of(prompt: Any) -> Any:
    if isinstance(prompt, dict):  # generate
        found = prompt["multi_modal_data"]["image"]
        return found[0] if isinstance(found, list) else found
    return next(part["image_pil"] for message in prompt for part in message["content"] if "image_pil" in part)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        case = {"grpo": grpo, "kinds": kinds}[sys.argv[1]]
        Path(sys.argv[2]).write_text(json.dumps(case(Path(scratch)), indent=1))
