"""What a path holds: a transformers model, a PEFT adapter or a GGUF file. Reads JSON and names; loads nothing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from trlpatch.errors import NotServable
from trlpatch.policy.lora_support import config_reason

Kind = Literal["model", "adapter", "gguf"]

GGUF_MAGIC = b"GGUF"
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class Artifact:
    """Something that a server can load.

    Attributes:
        kind: "model" is a directory of transformers, "adapter" a directory of PEFT, "gguf" a file.
        path: the directory or the file, absolute.
        name: what the server calls it, unless it is told otherwise.
        base: of an adapter its base model, a directory or a hub id; of a GGUF file where its tokenizer is, or None.
        rank: of an adapter the largest LoRA rank in it.
        tokenizer: the directory whose tokenizer the model was trained with, where that is not the model's own.
        template: whether a chat template is there.
    """

    kind: Kind
    path: Path
    name: str
    base: str | None = None
    rank: int = 0
    tokenizer: Path | None = None
    template: bool = False

    def __str__(self) -> str:
        words = {"model": "transformers model", "adapter": "PEFT adapter", "gguf": "GGUF file"}
        on = f" on {self.base}" if self.kind == "adapter" else ""
        return f"{words[self.kind]} {self.path}{on}"


def detect(path: str | Path, *, base: str | None = None) -> Artifact:
    """Return what `path` holds. `base` takes the place of the base model that an adapter names.

    Raises:
        NotServable: nothing that a server could load, several things, or an adapter that no server can carry.
    """
    place = Path(path).expanduser().absolute()
    if place.is_file():
        return _gguf(place, base)
    if not place.is_dir():
        raise NotServable(
            f"{path}: expected a directory of a model or an adapter, or a .gguf file; nothing is there. Checkpoints "
            "of a trainer are in its output_dir, as checkpoint-<step>"
        )
    weights = _any(place, MODEL_WEIGHTS)
    if (place / ADAPTER_CONFIG).is_file():
        if weights is not None and (place / "config.json").is_file():
            raise NotServable(
                f"{path} holds both an adapter ({ADAPTER_CONFIG}) and a model ({weights.name}), and which one is "
                "meant cannot be told. Move one of them into a directory of its own"
            )
        return _adapter(place, base)
    if (place / "config.json").is_file() and weights is not None:
        return Artifact("model", place, _name(place), template=_has_template(place))
    files = _models_in(place)
    if len(files) == 1:
        return _gguf(files[0], base)
    raise NotServable(_nothing_to_serve(path, place, files))


def _adapter(place: Path, base: str | None) -> Artifact:
    """Describe an adapter directory, after checking that a server can carry the adapter."""
    source = place / ADAPTER_CONFIG
    try:
        config: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotServable(f"{source}: expected PEFT's configuration as JSON: {error}") from error
    if _any(place, ADAPTER_WEIGHTS) is None:
        raise NotServable(f"{place} has {ADAPTER_CONFIG}, but neither {' nor '.join(ADAPTER_WEIGHTS)} beside it")
    reason = _not_carried(config)
    if reason is not None:
        raise NotServable(
            f"{place}: vLLM cannot serve this adapter: {reason}. Merge it into its base model first: "
            f"trlpatch export merged {place} --out DIR, then trlpatch serve DIR"
        )
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise NotServable(f"{source} names no base model (base_model_name_or_path); pass --base DIR_OR_HUB_ID")
    return Artifact(
        "adapter",
        place,
        _name(place),
        base=_base_directory(base, place),
        rank=max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]),
        tokenizer=place if _own_tokenizer(place, Path(base)) else None,
        template=_has_template(place) or _has_template(Path(base)),
    )


def _not_carried(config: dict[str, Any]) -> str | None:
    """Why vLLM's `--lora-modules` would refuse the adapter, or serve something else; None when it carries it."""
    if config.get("peft_type") != "LORA":
        return f"its peft_type is {config.get('peft_type')}, not LORA"
    reason = config_reason(SimpleNamespace(**config))
    if reason is not None:
        return reason
    # vLLM reads `r` and `lora_alpha` alone (PEFTHelper, 0.28), and scales every layer by them.
    for name in ("alpha_pattern", "rank_pattern"):
        if config.get(name):
            return f"vLLM does not read {name}={config[name]!r}, and would scale these layers wrongly without a word"
    return None


def _base_directory(base: str, adapter: Path) -> str:
    """Return the base as given where it is a hub id, else as an absolute path that must be a model."""
    place = Path(base).expanduser()
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise NotServable(f"{place}, the base model of {adapter}, has no config.json; pass --base DIR_OR_HUB_ID")
        return str(place.absolute())
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise NotServable(
            f"{adapter} was trained on the base model {base}, and nothing is there. Pass --base DIR_OR_HUB_ID with "
            "the place where it is now"
        )
    return base


def _own_tokenizer(place: Path, base: Path) -> bool:
    """Whether the tokenizer that TRL saves beside an adapter has to take the place of the base's.

    Where both say the same it need not: vLLM looks for a model's configuration in the directory of a tokenizer, and
    its log has an error for each directory without one.
    """
    return (place / "tokenizer_config.json").is_file() and _tokenizer_of(place) != _tokenizer_of(base)


def _tokenizer_of(place: Path) -> tuple[Any, ...]:
    """What of a tokenizer a server depends on: its tokens, the end of a text, the chat template."""
    texts = [
        (place / name).read_bytes() if (place / name).is_file() else None
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
    ]
    config = _tokenizer_config(place)
    return (*texts, *(json.dumps(config.get(name)) for name in ("bos_token", "eos_token", "chat_template")))


def _tokenizer_config(place: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _gguf(place: Path, base: str | None) -> Artifact:
    """Describe a GGUF file; of one in parts, the first part."""
    with place.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise NotServable(f"{place}: expected a directory or a GGUF file, found one that does not begin as GGUF")
    part = _SPLIT.search(place.name)
    if part is not None and int(part[1]) != 1:
        first = place.with_name(f"{place.name[: part.start()]}-00001-of-{part[2]}.gguf")
        raise NotServable(f"{place} is part {int(part[1])} of {int(part[2])}; serve the first one: {first}")
    beside = place.parent if (place.parent / "tokenizer_config.json").is_file() else None
    return Artifact("gguf", place, _SPLIT.sub("", place.name).removesuffix(".gguf"), base=base, tokenizer=beside)


def _models_in(place: Path) -> list[Path]:
    """The GGUF models of a directory: no projectors (mmproj), and of files in parts the first part."""
    files = sorted(path for path in place.glob("*.gguf") if not path.name.startswith("mmproj"))
    return [path for path in files if (part := _SPLIT.search(path.name)) is None or int(part[1]) == 1]


def _nothing_to_serve(path: str | Path, place: Path, files: list[Path]) -> str:
    if files:
        return f"{path} holds {len(files)} GGUF files; name one: " + ", ".join(
            f"trlpatch serve {file}" for file in files
        )
    checkpoints = [child for child in place.iterdir() if child.is_dir() and _CHECKPOINT.search(child.name)]
    if checkpoints:
        newest = max(checkpoints, key=lambda child: int(child.name.rpartition("-")[2]))
        return f"{path} is the output directory of a trainer; name a checkpoint of it: trlpatch serve {newest}"
    adapters = sorted(child for child in place.iterdir() if (child / ADAPTER_CONFIG).is_file())
    if adapters:
        return f"{path} holds adapters in directories of their own; name one: trlpatch serve {adapters[0]}"
    if (place / "config.json").is_file():
        return f"{path} has config.json, but no weights ({', '.join(MODEL_WEIGHTS)}): was saving cut off?"
    return (
        f"{path}: expected config.json with weights, {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS[0]}, or a .gguf file; it "
        "has none of them"
    )


def _name(place: Path) -> str:
    return place.name or "model"


def _any(place: Path, patterns: tuple[str, ...]) -> Path | None:
    return next((file for pattern in patterns for file in sorted(place.glob(pattern))), None)


def _has_template(place: Path) -> bool:
    if (place / "chat_template.jinja").is_file() or (place / "chat_template.json").is_file():
        return True
    return bool(_tokenizer_config(place).get("chat_template"))
