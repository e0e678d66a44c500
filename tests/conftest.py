"""What every test shares: no test touches the user's home or caches, or reaches a model hub."""

from __future__ import annotations

import gc
import os
import signal
from typing import TYPE_CHECKING

import pytest

pytest_plugins = ["tests.tiers", "pytester"]

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trlpatch")
    group.addoption("--golden-update", action="store_true", help="write golden/ anew instead of comparing with it")
    group.addoption(
        "--trl",
        action="append",
        default=[],
        metavar="VERSION",
        help="only this pinned TRL release, repeatable; a tox environment name such as trl1.9.2-golden will do",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell has what runs in its background ignore SIGINT, which all that is started there would ignore as well.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--golden-update") and os.environ.get("CI"):
        raise pytest.UsageError(
            "--golden-update is refused because CI is set: goldens are written and reviewed by people. "
            "Run `pytest tests/golden --golden-update` on your machine and commit the result."
        )


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep fixtures that outlive a test, and the processes they start, out of the user's trlpatch cache."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRLPATCH_CACHE_DIR", str(tmp_path_factory.mktemp("trlpatch-cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def memory_of_engines() -> Iterator[None]:
    """Give back what the engines of a file held, a GiB of KV cache each.

    vLLM calls `gc.freeze()` where it has built an engine (`EngineCore.__init__`): nothing that is part of a cycle is
    collected any more, until its `shutdown`, which nothing calls for an engine that is only let go of. Two processes
    of pytest had 20 GiB, and the kernel killed Ray's actors, which it is told to kill first.
    """
    yield
    if gc.get_freeze_count():
        from trlpatch.engine.build import let_go_of_engines

        let_go_of_engines()


@pytest.fixture(autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a home directory and a trlpatch cache of its own."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in [name for name in os.environ if name.startswith("TRLPATCH_")]:
        monkeypatch.delenv(name)
    return home
