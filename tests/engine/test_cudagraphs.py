"""What an engine is told to capture. Needs neither torch nor vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from trlpatch.engine import cudagraphs
from trlpatch.engine.cudagraphs import capture_sizes, compilation_config


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    fields = {"cudagraph_capture_sizes", "cudagraph_specialize_lora", "level"}
    monkeypatch.setattr(cudagraphs, "class_fields", lambda file, name: fields)
    return fields


@pytest.mark.parametrize("most", [None, 1, 3, 8, 20, 64, 256, 512, 1024])
def test_sizes_ascend_to_the_largest_batch(most: int | None) -> None:
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(512, most or 512)
    assert len(sizes) <= 23, "vLLM has 51"


def test_no_batch_is_padded_by_more_than_a_quarter_or_seven() -> None:
    sizes = capture_sizes(None)
    for batch in range(1, 513):
        graph = min(size for size in sizes if size >= batch)
        assert graph - batch <= max(7, batch // 4), batch


def test_an_engine_captures_up_to_its_batch() -> None:
    assert compilation_config({"max_num_seqs": 8}) == {
        "cudagraph_capture_sizes": [1, 2, 4, 8],
        "cudagraph_specialize_lora": False,
    }


@pytest.mark.parametrize(
    "said",
    [
        {"compilation_config": 3},
        {"compilation_config": 0},
        {"enforce_eager": True},
        {"cudagraph_capture_sizes": []},
        {"max_cudagraph_capture_size": 0},
        {"speculative_config": {"model": "m"}},
    ],
)
def test_what_the_user_says_is_the_last_word(said: dict[str, Any]) -> None:
    assert compilation_config(said) == {}
    assert compilation_config({"compilation_config": None, "enforce_eager": False})


def test_blackwell_keeps_vllms_larger_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraphs.device, "capability", lambda: (10, 0))
    assert compilation_config({}) == {"cudagraph_specialize_lora": False}


def test_a_vllm_that_does_not_know_a_field_is_not_told(known: set[str]) -> None:
    known.discard("cudagraph_specialize_lora")
    assert compilation_config({}).keys() == {"cudagraph_capture_sizes"}
    known.clear()
    assert compilation_config({}) == {}
