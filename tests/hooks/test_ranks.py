from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from trlpatch.errors import EngineMismatch, SharedWeights  # noqa: E402
from trlpatch.hooks import ranks  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("asked", "initialized", "found", "refused"),
    [("2", True, 1, True), ("2", True, 2, False), ("2", False, 1, False), ("1", True, 1, False), ("", True, 1, False)],
)
def test_a_group_of_one_among_several_ranks_is_refused(
    asked: str, initialized: bool, found: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", asked)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: found)
    if refused:
        with pytest.raises(EngineMismatch, match=r"a launcher started 2 ranks.*accelerate\.PartialState\(\)"):
            ranks.require_process_group(object())
    else:
        ranks.require_process_group(object())


@pytest.mark.parametrize(
    ("args", "who"),
    [
        (SimpleNamespace(fsdp=True), r"fsdp=True"),
        (SimpleNamespace(fsdp=["full_shard"]), r"fsdp=\['full_shard'\]"),
        (SimpleNamespace(fsdp=[], hf_deepspeed_config=SimpleNamespace(is_zero3=lambda: True)), "DeepSpeed ZeRO-3"),
        (SimpleNamespace(fsdp=None, hf_deepspeed_config=SimpleNamespace(is_zero3=lambda: False)), None),
        (SimpleNamespace(fsdp=""), None),
        (SimpleNamespace(), None),
    ],
    ids=["fsdp", "fsdp of transformers 4", "zero-3", "zero-2", "neither", "no such fields"],
)
def test_weights_that_are_the_engines_own_are_not_sharded(args: SimpleNamespace, who: str | None) -> None:
    if who is None:
        ranks.require_unsharded_arguments(object(), args)
    else:
        with pytest.raises(SharedWeights, match=rf"{who} would split base weights .*share_weights=False"):
            ranks.require_unsharded_arguments(object(), args)
