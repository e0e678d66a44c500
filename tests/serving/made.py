"""Directories and files that look like what is served, without weights that could be loaded."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAKE = Path(__file__).parent / "fake"


def model(place: Path, *, template: bool = False) -> Path:
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}", encoding="utf-8")
    (place / "model.safetensors").touch()
    (place / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ messages }}"} if template else {}), encoding="utf-8"
    )
    return place


def adapter(place: Path, base: Path | str | None, **settings: Any) -> Path:
    place.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"]}
    named = {} if base is None else {"base_model_name_or_path": str(base)}
    (place / "adapter_config.json").write_text(json.dumps({**config, **named, **settings}), encoding="utf-8")
    (place / "adapter_model.safetensors").touch()
    return place


def gguf(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"GGUF\x03\x00\x00\x00")
    return place


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def eventually(holds: Callable[[], bool], seconds: float = 300.0) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def group_of(pid: int) -> list[int]:
    """The processes of a process group that run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                if os.getpgid(int(entry.name)) == pid:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found
