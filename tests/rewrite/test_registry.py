"""The order of application: `after` decides, then the name."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from trlpatch.rewrite.patch import Patch
from trlpatch.rewrite.registry import ordered, patches, repairs, rollout_patches, speed_patches


def made(name: str, *after: str) -> Patch:
    return Patch(name, summary="", hooks=(), after=after)


def test_what_is_free_is_sorted_by_name_however_it_was_found():
    found = [made("a", "c"), made("b"), made("c"), made("d", "b", "c"), made("e", "a")]
    for _ in range(20):
        random.shuffle(found)
        assert [patch.name for patch in ordered(found)] == ["b", "c", "a", "d", "e"]


def test_after_names_patches_that_exist():
    with pytest.raises(ValueError, match=r"patch a: after=\['gone'\]"):
        ordered([made("a", "gone")])


def test_patches_do_not_wait_for_each_other():
    with pytest.raises(ValueError, match="cycle"):
        ordered([made("a", "b"), made("b", "a")])


def test_rollout_patches_come_in_the_order_of_a_run_and_before_every_repair():
    assert [patch.name for patch in rollout_patches()] == [
        "configure",
        "engine_reuse",
        "adapter_sync",
        "live_adapter",
        "rollout_func",
        "sleep",
        "sampling",
        "sampling_config",
    ]
    assert patches() == rollout_patches() + speed_patches() + repairs()


def test_a_sleep_is_inserted_after_a_rollout_call_that_is_already_edited():
    names = [patch.name for patch in patches()]
    assert names.index("live_adapter") < names.index("sleep")


def test_every_module_is_found_under_its_own_name():
    folder = Path(__file__).parents[2] / "trlpatch/rewrite/patches"
    for name, found in (("rollout", rollout_patches()), ("speed", speed_patches()), ("repairs", repairs())):
        modules = {path.stem for path in (folder / name).glob("*.py")} - {"__init__"}
        assert {patch.name for patch in found} == modules
