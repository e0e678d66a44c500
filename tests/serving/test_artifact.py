"""What a path holds, and what is said of one that holds nothing to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving import made
from trlpatch.errors import NotServable
from trlpatch.serving.artifact import detect


def test_a_directory_with_config_and_weights_is_a_model(tmp_path: Path) -> None:
    found = detect(made.model(tmp_path / "merged", template=True))
    assert (found.kind, found.name, found.template) == ("model", "merged", True)


def test_a_relative_path_and_a_trailing_slash_name_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = made.model(tmp_path / "merged")
    monkeypatch.chdir(place)
    assert detect(".").name == "merged"
    assert detect(f"{place}/").path == place


def test_a_checkpoint_of_a_trainer_with_an_adapter_is_that_adapter(tmp_path: Path) -> None:
    base = made.model(tmp_path / "base")
    place = made.adapter(tmp_path / "out" / "checkpoint-10", base, rank_pattern={})
    (place / "trainer_state.json").write_text("{}", encoding="utf-8")
    found = detect(place)
    assert (found.kind, found.name, found.base, found.rank) == ("adapter", "checkpoint-10", str(base), 8)
    assert found.tokenizer is None


@pytest.mark.parametrize(
    ("file", "text", "own"),
    [
        ("tokenizer_config.json", '{"padding_side": "left"}', False),
        ("tokenizer_config.json", '{"eos_token": "<|im_end|>"}', True),
        ("tokenizer.json", "{}", True),
        ("chat_template.jinja", "{{ messages }}", True),
    ],
)
def test_the_tokenizer_beside_an_adapter_goes_before_another_one_of_its_base(
    tmp_path: Path, file: str, text: str, own: bool
) -> None:
    place = made.adapter(tmp_path / "a", made.model(tmp_path / "base"))
    (place / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (place / file).write_text(text, encoding="utf-8")
    assert detect(place).tokenizer == (place if own else None)


def test_the_base_that_is_given_goes_before_the_one_that_is_named(tmp_path: Path) -> None:
    moved = made.model(tmp_path / "moved", template=True)
    place = made.adapter(tmp_path / "adapter", "/gone/base")
    with pytest.raises(NotServable, match=r"trained on the base model /gone/base, and nothing is there\. Pass --base"):
        detect(place)
    assert detect(place, base=str(moved)).base == str(moved)
    assert detect(place, base=str(moved)).template
    assert detect(place, base="Qwen/Qwen2.5-7B").base == "Qwen/Qwen2.5-7B"
    with pytest.raises(NotServable, match=r"has no config\.json; pass --base"):
        detect(place, base=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "trained in full"),
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "its peft_type is IA3"),
        ({"alpha_pattern": {"q_proj": 4}}, "vLLM does not read alpha_pattern={'q_proj': 4}"),
        ({"rank_pattern": {"q_proj": 4}}, "vLLM does not read rank_pattern={'q_proj': 4}"),
        ({"bias": "all"}, "trains biases"),
    ],
)
def test_an_adapter_that_vllm_would_serve_wrongly_is_to_be_merged(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    place = made.adapter(tmp_path / "adapter", "Qwen/Qwen2.5-7B", **settings)
    with pytest.raises(NotServable, match="trlpatch export merged") as failed:
        detect(place)
    assert reason in str(failed.value)


def test_a_gguf_file_and_a_directory_with_one_are_that_file(tmp_path: Path) -> None:
    file = made.gguf(tmp_path / "q" / "tiny-q8_0.gguf")
    made.gguf(tmp_path / "q" / "mmproj-tiny.gguf")
    for path in (file, file.parent):
        found = detect(path)
        assert (found.kind, found.path, found.name) == ("gguf", file, "tiny-q8_0")


def test_a_file_in_parts_is_its_first_part(tmp_path: Path) -> None:
    first = made.gguf(tmp_path / "tiny-00001-of-00002.gguf")
    second = made.gguf(tmp_path / "tiny-00002-of-00002.gguf")
    assert detect(tmp_path).path == first
    assert detect(tmp_path).name == "tiny"
    with pytest.raises(NotServable, match=f"part 2 of 2; serve the first one: {first}"):
        detect(second)


def refused(path: Path) -> str:
    with pytest.raises(NotServable) as failed:
        detect(path)
    return str(failed.value)


def test_what_holds_nothing_says_what_was_expected_and_what_to_do(tmp_path: Path) -> None:
    assert "nothing is there" in refused(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "expected config.json with weights, adapter_config.json" in refused(empty)
    text = tmp_path / "notes.txt"
    text.write_text("x", encoding="utf-8")
    assert "does not begin as GGUF" in refused(text)
    cut = made.model(tmp_path / "cut")
    (cut / "model.safetensors").unlink()
    assert "no weights" in refused(cut)
    weightless = made.adapter(tmp_path / "weightless", "b/a")
    (weightless / "adapter_model.safetensors").unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refused(weightless)
    assert "names no base model" in refused(made.adapter(tmp_path / "baseless", None))
    (weightless / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "as JSON" in refused(weightless) or "neither" in refused(weightless)


def test_what_holds_several_things_names_them(tmp_path: Path) -> None:
    made.gguf(tmp_path / "q" / "a.gguf")
    made.gguf(tmp_path / "q" / "b.gguf")
    assert f"2 GGUF files; name one: trlpatch serve {tmp_path / 'q' / 'a.gguf'}, " in refused(tmp_path / "q")
    for step in (5, 10, 9):
        made.adapter(tmp_path / "out" / f"checkpoint-{step}", "b/a")
    assert f"trlpatch serve {tmp_path / 'out' / 'checkpoint-10'}" in refused(tmp_path / "out")
    made.adapter(tmp_path / "named" / "policy", "b/a")
    assert f"trlpatch serve {tmp_path / 'named' / 'policy'}" in refused(tmp_path / "named")
    both = made.model(tmp_path / "both")
    (both / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "holds both an adapter" in refused(both)
