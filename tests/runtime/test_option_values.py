"""Options that PatchFastRL has not, and values that they cannot have."""

from __future__ import annotations

import pytest

from trlpatch import errors
from trlpatch.runtime import session


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("colocate", "yes"),
        ("sleep", True),
        ("adapter", "on"),
        ("on_drift", "ignore"),
        ("skip", "sleep"),
        ("skip", (1,)),
        ("skip", None),
        ("skip", 5),
        ("skip", {"sleep": 1}),
        ("skip", iter(["sleep"])),
        ("skip", b"sleep"),
    ],
)
def test_bad_options_name_what_is_allowed(fake_trl, option, value):
    with pytest.raises(errors.InvalidOption, match=rf"^PatchFastRL\({option}="):
        session.PatchFastRL("grpo", **{option: value})


def test_an_option_that_is_not_there_is_refused_with_the_nearest(fake_trl):
    with pytest.raises(
        errors.UnknownArgument, match=r"^PatchFastRL\(oldlogps=\.\.\.\): .* mean old_logps=\?"
    ) as raised:
        session.PatchFastRL(oldlogps="reuse")
    assert isinstance(raised.value, TypeError)
    assert "It has algorithm, colocate, sleep, " in str(raised.value)
    with pytest.raises(
        errors.UnknownArgument, match=r"^PatchFastRL\(xyz=\.\.\.\): there is no such option\. It has alg"
    ):
        session.PatchFastRL(xyz=1)
