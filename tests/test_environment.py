"""What `trlpatch status` says about loading models here."""

from __future__ import annotations

import importlib.util

import pytest

from trlpatch.environment import _loading


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        (set(), ()),
        ({"vllm"}, ("without vLLM: fast_inference=False only",)),
        ({"bitsandbytes"}, ("without bitsandbytes: load_in_4bit=False only",)),
        ({"torch", "peft", "vllm"}, ("needs torch, peft",)),
    ],
)
def test_missing_packages_are_named_with_the_argument_to_set(
    monkeypatch: pytest.MonkeyPatch, absent: set[str], says: tuple[str, ...]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else object())
    assert _loading() == says
