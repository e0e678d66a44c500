from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from trlpatch.errors import EngineMismatch  # noqa: E402
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
