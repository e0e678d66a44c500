"""What the engine is given for a prompt with images, and what becomes of another prompt than the trainer's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from trlpatch import hooks
from trlpatch.errors import EngineMismatch

pytestmark = pytest.mark.torch

IMAGE = 9
EXPANDED = [1, 2, IMAGE, IMAGE, IMAGE, 3, IMAGE, IMAGE, 4]
PLAIN = [1, 2, 3]


def owner(**config: Any) -> Any:
    return SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(**config)))


def row(ids: list[int], *images: str) -> dict[str, Any]:
    return (
        {"prompt_token_ids": ids, "multi_modal_data": {"image": list(images)}} if images else {"prompt_token_ids": ids}
    )


def read(*prompts: list[int]) -> list[Any]:
    return [SimpleNamespace(prompt_token_ids=ids) for ids in prompts]


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index"])
def test_an_image_is_one_placeholder(name: str) -> None:
    prompts = [row(EXPANDED, "one", "other"), row(PLAIN)]
    given = hooks.image_prompts(owner(**{name: IMAGE}), prompts)
    assert given == [row([1, 2, IMAGE, 3, IMAGE, 4], "one", "other"), row(PLAIN)]
    assert prompts[0]["prompt_token_ids"] == EXPANDED, "the trainer goes on with its own"


@pytest.mark.parametrize(
    "prompts", [[row(PLAIN)], ["text"], [{"prompt": "text", "multi_modal_data": {"image": "one"}}]]
)
def test_prompts_without_images_or_ids_stay(prompts: list[Any]) -> None:
    assert hooks.image_prompts(owner(image_token_id=IMAGE), prompts) is prompts
    outputs = read([1])
    assert hooks.same_prompts(owner(image_token_id=IMAGE), outputs) is outputs


def rolled_out(trainer: Any, prompts: list[Any], outputs: list[Any]) -> Any:
    hooks.image_prompts(trainer, prompts)
    return hooks.same_prompts(trainer, outputs)


def test_what_the_engine_has_read_is_what_the_trainer_has() -> None:
    outputs = read(EXPANDED, PLAIN)
    assert rolled_out(owner(image_token_id=IMAGE), [row(EXPANDED, "one", "other"), row(PLAIN)], outputs) is outputs
    expanded = read([1, IMAGE, IMAGE, 2])
    found = rolled_out(owner(image_token_id=IMAGE), [row([1, IMAGE, 2], "one")], expanded)
    assert found is expanded, "a TRL that expands none"


@pytest.mark.parametrize("config", [{"image_token_id": IMAGE}, {}])
def test_another_prompt_is_refused_and_the_next_rollout_is_compared_with_its_own(config: dict[str, int]) -> None:
    with pytest.raises(EngineMismatch, match=r"has read 10 tokens, and the trainer goes on with 9"):
        rolled_out(owner(**config), [row(EXPANDED, "one", "other")], read([*EXPANDED, IMAGE]))
    assert rolled_out(owner(**config), [row(PLAIN)], outputs := read([*EXPANDED, IMAGE])) is outputs
