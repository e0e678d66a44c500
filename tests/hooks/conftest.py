from __future__ import annotations

from collections.abc import Iterator

import pytest

from trlpatch.options import activate


@pytest.fixture(autouse=True)
def default_options() -> Iterator[None]:
    activate(None)
    yield
    activate(None)
