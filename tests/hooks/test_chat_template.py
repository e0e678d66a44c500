"""Whose chat template `llm.chat` renders with."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from trlpatch import hooks

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("own", "given", "used"),
    [
        ("set after loading", None, "set after loading"),
        ("set after loading", "TRL's for training", "TRL's for training"),
        (None, None, None),
        ({"default": "a", "tool_use": "b"}, None, None),
    ],
)
def test_the_trainers(own: Any, given: str | None, used: str | None) -> None:
    owner: Any = SimpleNamespace(processing_class=SimpleNamespace(chat_template=own))
    assert hooks.chat_template(owner, given) == used


def test_an_owner_without_a_tokenizer() -> None:
    owner: Any = SimpleNamespace()
    assert hooks.chat_template(owner) is None
