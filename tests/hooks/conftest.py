from __future__ import annotations

from collections.abc import Iterator

import pytest

from trlpatch.hooks import settings


@pytest.fixture(autouse=True)
def default_options() -> Iterator[None]:
    settings.set_options(None)
    yield
    settings.set_options(None)
