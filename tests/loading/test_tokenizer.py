"""The directory that an engine gets for a tokenizer which has no model beside it."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import base_model
from tests.loading.test_load_config import ask
from tests.words import byte_tokenizer
from trlpatch.loading.load_config import LoadConfig
from trlpatch.loading.tokenizer import engine_tokenizer, keep, load_tokenizer

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("models")
    words = byte_tokenizer(["one two three"] * 20, vocabulary=300)
    for name in ("model", "plain"):
        words.save_pretrained(root / name)
    base_model().save_pretrained(root / "model")
    # As trainers do: the class that the model's type asks for is in it.
    AutoTokenizer.from_pretrained(root / "model").save_pretrained(root / "alone")
    return {name: root / name for name in ("model", "plain", "alone")}


def asked(places: dict[str, Path], **changes: Any) -> LoadConfig:
    config = ask(model_name=str(places["model"]), load_in_4bit=False, fast_inference=False)
    return dataclasses.replace(config, **changes)


def test_a_tokenizer_beside_a_model_is_left_where_it_is(places: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(places["model"], tmp_path / "other")
    for name in (None, str(other)):
        config = asked(places, tokenizer_name=name)
        assert engine_tokenizer(config, None, load_tokenizer(config)) == {}


def test_what_was_asked_of_the_engine_wins(places: dict[str, Path]) -> None:
    config = asked(places, tokenizer_name=str(places["alone"]), engine={"tokenizer": "elsewhere"})
    assert engine_tokenizer(config, None, load_tokenizer(config)) == {}


def test_a_tokenizer_alone_gets_the_configuration_of_the_model(places: dict[str, Path]) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = asked(places, tokenizer_name=str(places["alone"]))
    tokenizer = load_tokenizer(config)
    hf_config = AutoConfig.from_pretrained(places["model"])
    made = Path(engine_tokenizer(config, hf_config, tokenizer)["tokenizer"])
    assert AutoConfig.from_pretrained(made).model_type == hf_config.model_type
    assert AutoTokenizer.from_pretrained(made).get_vocab() == tokenizer.get_vocab()
    assert not (places["alone"] / "config.json").exists()


def test_one_that_the_type_of_the_model_would_change_is_left_where_it_is(places: dict[str, Path]) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = asked(places, tokenizer_name=str(places["plain"]))
    tokenizer = load_tokenizer(config)
    changes = AutoTokenizer.from_pretrained(places["model"]).get_vocab() != tokenizer.get_vocab()
    given = engine_tokenizer(config, AutoConfig.from_pretrained(places["model"]), tokenizer)
    assert bool(given) is not changes


def test_the_directory_goes_with_the_tokenizer_and_that_with_the_engine(places: dict[str, Path]) -> None:
    from transformers import AutoConfig

    class Engine:
        pass

    config = asked(places, tokenizer_name=str(places["alone"]))
    tokenizer, engine = load_tokenizer(config), Engine()
    hf_config = AutoConfig.from_pretrained(places["model"])
    made = Path(engine_tokenizer(config, hf_config, tokenizer)["tokenizer"])
    keep(tokenizer, engine)
    del tokenizer
    gc.collect()
    assert made.is_dir()
    del engine
    gc.collect()
    assert not made.exists()
