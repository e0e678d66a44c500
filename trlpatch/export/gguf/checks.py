"""What llama.cpp computes otherwise than transformers, and what a GGUF cannot carry: found before anything is written.

The converter is silent about all of it (of llama-cpp-python 0.3.36; compared by running, docs/gguf.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trlpatch.errors import CannotExport
from trlpatch.export.places import reads_images

Config = Mapping[str, Any]

ACCEPTED = ("sliding_window", "hidden_act", "norm_topk_prob")
"""Findings that `accept=` takes: a file can be written all the same."""

SLIDING_WINDOW = "sliding_window"
"""Name of the one finding that lets a file be right, for prompts that are short enough."""


@dataclass(frozen=True)
class Finding:
    """Something that is lost or computed otherwise.

    Attributes:
        name: what `accept=` calls it.
        text: what it is, and what to do.
        wrong: the file would answer otherwise than the model; without `accept` the export is refused.
    """

    name: str
    text: str
    wrong: bool


_SILU, _GELU = {"silu", "swish"}, {"gelu_pytorch_tanh", "gelu_new", "gelu_fast"}
ACTIVATIONS: dict[str, set[str]] = {
    "LlamaForCausalLM": _SILU, "MistralForCausalLM": _SILU, "MixtralForCausalLM": _SILU, "Qwen2ForCausalLM": _SILU,
    "Qwen2MoeForCausalLM": _SILU, "Qwen3ForCausalLM": _SILU, "Qwen3MoeForCausalLM": _SILU, "Phi3ForCausalLM": _SILU,
    "Olmo2ForCausalLM": _SILU, "OlmoeForCausalLM": _SILU, "SmolLM3ForCausalLM": _SILU, "GraniteForCausalLM": _SILU,
    "StableLmForCausalLM": _SILU, "CohereForCausalLM": _SILU, "Cohere2ForCausalLM": _SILU, "Glm4ForCausalLM": _SILU,
    "Exaone4ForCausalLM": _SILU, "GemmaForCausalLM": _GELU, "Gemma2ForCausalLM": _GELU, "Gemma3ForCausalLM": _GELU,
    "Starcoder2ForCausalLM": _GELU, "PhiForCausalLM": _GELU, "GPT2LMHeadModel": _GELU,
}  # fmt: skip
"""What the graph of an architecture applies, whatever its config says."""

NO_WINDOW = (
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
)  # fmt: skip
"""Architectures whose graph has no sliding window; their configs have."""

NORMALIZED = {"Qwen3MoeForCausalLM": True, "Qwen2MoeForCausalLM": False, "OlmoeForCausalLM": False}
"""Whether the graph makes the weights of the chosen experts sum to one, whatever `norm_topk_prob` says."""


def findings(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    """Look at the settings in a folder, and at the shapes of the weights."""
    text_config = settings_of(folder)
    checks: list[Callable[[], list[Finding]]] = [
        lambda: _window(text_config),
        lambda: _activation(text_config),
        lambda: _experts(text_config),
        lambda: _tokenizer(folder, text_config, shapes),
        lambda: _ends(folder, text_config),
    ]
    return [finding for check in checks for finding in check()]


def refuse_images(config: Any, where: str) -> None:
    """Raise CannotExport for a model with a vision tower.

    The converter drops the tower and its connector, adapted or not, without a message: llama.cpp reads them from a
    second file, which `--mmproj` makes of a directory.
    """
    if reads_images(config):
        raise CannotExport(
            f"exporting {where} as GGUF: {type(config).__name__} reads images, and a GGUF of it would hold the "
            "language model alone; expected a model that reads text. Export merged weights, which have the vision "
            "tower and the processor (save_pretrained_merged, trlpatch export merged), and serve those; or run "
            "llama.cpp's convert_hf_to_gguf.py on that directory twice, the second time with --mmproj: what they "
            "compute has not been compared"
        )


def window_of(config: Config) -> int | None:
    """Return the sliding window that transformers computes some layer with; None where all see everything."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return None
    kinds = config.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    longest = config.get("max_position_embeddings")
    return None if isinstance(longest, int) and longest <= window else window


def architecture_of(config: Config) -> str:
    """Return the class name in a config."""
    return str((config.get("architectures") or ["?"])[0])


def _window(config: Config) -> list[Finding]:
    window, name = window_of(config), architecture_of(config)
    if window is None or name not in NO_WINDOW:
        return []
    return [
        Finding(
            SLIDING_WINDOW,
            f"llama.cpp has no sliding window for {name}: behind {window} tokens it attends to what the model does "
            "not see. Below that its answers are the model's: run it with a context of at most that",
            wrong=True,
        )
    ]


def _activation(config: Config) -> list[Finding]:
    name = architecture_of(config)
    found = config.get("hidden_act") or config.get("hidden_activation") or config.get("activation_function")
    allowed = ACTIVATIONS.get(name)
    if allowed is None or found is None or found in allowed or (found == "gelu" and allowed is _GELU):
        return []
    return [
        Finding(
            "hidden_act",
            f"hidden_act={found!r}: llama.cpp computes {name} with {' or '.join(sorted(allowed))}, whatever the "
            "config says",
            wrong=True,
        )
    ]


def _experts(config: Config) -> list[Finding]:
    name = architecture_of(config)
    normalized = NORMALIZED.get(name)
    asked = config.get("norm_topk_prob", False)
    if normalized is None or asked is normalized:
        return []
    return [
        Finding(
            "norm_topk_prob",
            f"norm_topk_prob={asked}: llama.cpp computes {name} with {normalized}, whatever the config says",
            wrong=True,
        )
    ]


def _tokenizer(folder: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return [
            Finding("tokenizer", "there is no tokenizer.json or tokenizer.model; give tokenizer=, or its folder", True)
        ]
    found = []
    length, rows = _length(folder), _embedding_rows(shapes)
    if length is not None and rows is not None and length > rows:
        found.append(
            Finding(
                "tokenizer_length",
                f"the tokenizer has {length} tokens and the embedding {rows} rows: resize_token_embeddings was not "
                "called after tokens were added, or another model's tokenizer was given",
                wrong=True,
            )
        )
    settings = settings_file(folder / "tokenizer_config.json")
    if not settings.get("chat_template") and not any(
        (folder / one).is_file() for one in ("chat_template.jinja", "chat_template.json")
    ):
        found.append(
            Finding(
                "chat_template",
                "the tokenizer has no chat template: chats with this file are formatted by whatever program loads it; "
                "set tokenizer.chat_template to what the model was trained with",
                wrong=False,
            )
        )
    return found


def _length(folder: Path) -> int | None:
    """Return the number of tokens, one more than the largest id."""
    if not (folder / "tokenizer.json").is_file():
        return None
    data = settings_file(folder / "tokenizer.json")
    vocabulary = (data.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [one["id"] for one in data.get("added_tokens") or ()]
    return max(ids, default=-1) + 1


def _embedding_rows(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    names = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    return next((shape[0] for name, shape in shapes.items() if name.endswith(names)), None)


def _ends(folder: Path, config: Config) -> list[Finding]:
    generation = settings_file(folder / "generation_config.json")
    wanted = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = wanted if isinstance(wanted, list) else [wanted]
    token = settings_file(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    known = _ids(folder)
    written = known.get(text) if isinstance(text, str) else None
    names = {number: name for name, number in known.items()}
    dropped = [one for one in ids if isinstance(one, int) and one != written]
    if not dropped or not known:
        return []
    shown = ", ".join(f"{one} ({names[one]!r})" if one in names else str(one) for one in dropped)
    return [
        Finding(
            "eos_token_id",
            f"generation ends at token {shown} too, and a GGUF has the tokenizer's eos_token alone ({written}, "
            f"{text!r}). llama.cpp ends at a few more by their text (<|im_end|>, <|eot_id|>, ...); else give it as a "
            "stop string where the file is served",
            wrong=False,
        )
    ]


def _ids(folder: Path) -> dict[str, int]:
    data = settings_file(folder / "tokenizer.json")
    return {one["content"]: one["id"] for one in data.get("added_tokens") or ()}


def settings_file(path: Path) -> dict[str, Any]:
    """Return what a JSON file says; nothing where there is none."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}


def settings_of(folder: Path) -> dict[str, Any]:
    """Return config.json, with what is in `text_config` on top."""
    config = settings_file(folder / "config.json")
    return {**config, **(config.get("text_config") or {})}
