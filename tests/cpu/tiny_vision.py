"""Vision-language models small enough to train with a real vLLM on two CPU cores: random weights, processor, images.

Needs torchvision, which no stack has: tests/cpu/requirements-vision-<stack>.txt, beside it on PYTHONPATH.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import re
from pathlib import Path
from typing import Any

from tests.words import byte_tokenizer

COLOURS = {"red": (200, 30, 30), "blue": (0, 0, 255), "green": (20, 180, 60), "grey": (128, 128, 128)}
SIDE = 84
"""Pixels: 9 image tokens for Qwen2.5-VL, whose patches are 28 wide when merged."""

_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
}
"""head_dim 32: vLLM's CPU attention takes no less."""

_MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}


def template(placeholder: str) -> str:
    """A chat template for texts, and for lists of images and texts."""
    return (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% else %}" + placeholder + "{% endif %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def images(*names: str) -> list[Any]:
    """Plain squares of the named colours."""
    from PIL import Image

    return [Image.new("RGB", (SIDE, SIDE), COLOURS[name]) for name in names]


def dataset(count: int = 8, *, column: str = "image") -> Any:
    """Conversational prompts, each with an image in `column` (a list with one in `images`)."""
    from datasets import Dataset

    squares = images(*COLOURS)
    shown = [squares[i % len(squares)] for i in range(count)]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in tiny.prompts(count)],
            column: shown if column == "image" else [[one] for one in shown],
        }
    )


def checkpoint(directory: Path, kind: str = "qwen2_5_vl", *, seed: int = 0) -> Path:
    """Save a random-weight model of that kind with its processor; return where."""
    import torch

    torch.manual_seed(seed)
    model, processor = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "gemma3": _gemma3}[kind]()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    if kind == "gemma3":
        _name_as_on_the_hub(directory / "model.safetensors")
    return directory


def ordinary(words: Any) -> list[int]:
    """Ids that may be sampled: an image token in a completion is one that transformers looks for an image to."""
    return [i for i in range(len(words)) if i not in words.added_tokens_decoder or i == words.eos_token_id]


def _name_as_on_the_hub(file: Path) -> None:
    """Name the weights of Gemma 3's tower as its checkpoints do; vLLM 0.28 does not know transformers 5.23's names."""
    from safetensors.torch import load_file, save_file

    tower = re.compile(r"vision_tower\.(?!vision_model\.)")
    save_file({tower.sub("vision_tower.vision_model.", name): one for name, one in load_file(file).items()}, file)


def _tokens(*names: str) -> tuple[Any, list[int]]:
    words = byte_tokenizer(["the cat sat on the mat one two three user: assistant:"] * 20, vocabulary=384)
    words.add_special_tokens({"additional_special_tokens": list(names)})
    return words, [words.convert_tokens_to_ids(name) for name in names]


def _qwen_tokens() -> tuple[Any, list[int]]:
    import transformers

    words, ids = _tokens("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    if transformers.__version__ < "5":  # its processors take a tokenizer of their own class alone
        words = transformers.Qwen2TokenizerFast(
            tokenizer_object=words.backend_tokenizer,
            unk_token=None,
            eos_token=words.eos_token,
            pad_token=words.pad_token,
            padding_side="left",
        )
    return words, ids


def _qwen_processor(cls: Any, words: Any, patch: int) -> Any:
    from transformers import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    pixels = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    return cls(
        image_processor=Qwen2VLImageProcessor(patch_size=patch, merge_size=2, temporal_patch_size=2, **pixels),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    words, (start, end, image, video) = _qwen_tokens()
    tower = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": len(words), "rope_parameters": _MROPE, "rope_scaling": _MROPE, **_TEXT},
        vision_config=tower,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    _ends(config, words)
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_processor(Qwen2_5_VLProcessor, words, 14)


def _qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    words, (start, end, image, video) = _qwen_tokens()
    rope = {**_MROPE, "mrope_interleaved": True}
    tower = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(words),
            "head_dim": 32,
            "rope_parameters": rope,
            "rope_scaling": rope,
            # vLLM 0.28's CPU platform asks for the first architecture of the text model, where transformers has none.
            "architectures": ["Qwen3ForCausalLM"],
            **_TEXT,
        },
        vision_config=tower,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    _ends(config, words)
    return Qwen3VLForConditionalGeneration(config), _qwen_processor(Qwen3VLProcessor, words, 16)


def _gemma3() -> tuple[Any, Any]:
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    words, (start, end, image) = _tokens("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    words.add_tokens(["\n" * count for count in (1, 2, 3, 4)])  # vLLM looks for them around an image
    words._set_model_specific_special_tokens(
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    )
    config = Gemma3Config(
        text_config={"vocab_size": len(words), "head_dim": 32, "sliding_window": 64, **_TEXT},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
    )
    _ends(config, words)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=words,
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )
    model = Gemma3ForConditionalGeneration(config)
    projection = next(one for name, one in model.named_parameters() if name.endswith("mm_input_projection_weight"))
    torch.nn.init.normal_(projection, std=0.5)  # transformers makes it of zeroes: no image would be seen
    return model, processor


def _ends(config: Any, words: Any) -> None:
    for one in (config, config.get_text_config()):
        one.bos_token_id, one.eos_token_id, one.pad_token_id = None, words.eos_token_id, words.pad_token_id
