"""tokenizer.model is beside the settings where the tokenizer or the base has one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from trlpatch.export.gguf.sentencepiece_model import NAME, copy_sentencepiece


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache that has nothing."""

    class HFValidationError(Exception):
        pass

    hub, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    hub.try_to_load_from_cache = lambda name, file: None  # type: ignore[attr-defined]
    errors.HFValidationError = HFValidationError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)


@pytest.mark.parametrize("place", ["vocabulary", "name", "base", "nowhere"])
def test_it_is_copied_from_where_it_is(tmp_path: Path, place: str) -> None:
    settings, origin = tmp_path / "settings", tmp_path / "origin"
    settings.mkdir()
    origin.mkdir()
    (origin / NAME).write_bytes(b"pieces")
    tokenizer = SimpleNamespace(
        vocab_file=str(origin / NAME) if place == "vocabulary" else str(tmp_path / "vocab.json"),
        name_or_path=str(origin if place == "name" else tmp_path / "none"),
    )
    copy_sentencepiece(tokenizer, origin if place == "base" else None, settings)
    assert (settings / NAME).is_file() is (place != "nowhere")


def test_one_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"mine")
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / NAME).write_bytes(b"pieces")
    copy_sentencepiece(None, tmp_path / "origin", tmp_path)
    assert (tmp_path / NAME).read_bytes() == b"mine"
