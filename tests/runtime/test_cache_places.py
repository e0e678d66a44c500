"""Where the cache is, what else may lie there, and other processes in it."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import threading
from pathlib import Path

import pytest

from trlpatch import errors
from trlpatch.environment import inspect_environment
from trlpatch.runtime import cache as caching
from trlpatch.runtime import session
from trlpatch.runtime.cache import INDEX, MANIFEST, Cache, CacheRefused

KEY = "a" * 64


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the user database does not know, without HOME: containers that run as any user."""

    def unknown(user: object) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "TRLPATCH_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_without_a_home_directory_text_stays_in_memory(fake_trl, patch_grpo, no_home):
    with pytest.warns(errors.CacheUnavailable, match=r"home directory of user \d+ .*TRLPATCH_CACHE_DIR"):
        report = patch_grpo()
    assert set(report.cache.values()) == {"memory"}
    import trl

    assert trl.GRPOTrainer("model").step() == "step"


def test_without_a_home_directory_the_commands_say_so(fake_trl, no_home):
    with pytest.raises(CacheRefused, match="HOME is not set"):
        caching.path()
    assert (caching.size(), caching.clear()) == (0, 0)
    found = inspect_environment()
    assert not found.cache_writable
    assert not any(found.cached.values())


@pytest.mark.parametrize("name", ["TRLPATCH_CACHE_DIR", "TRLPATCH_DUMP"])
def test_a_directory_in_no_ones_home_is_refused_before_anything_changes(
    fake_trl, patch_grpo, no_home, monkeypatch, name
):
    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(fake_trl.cache))
    monkeypatch.setenv(name, "~nosuchuser/x")
    with pytest.raises(errors.InvalidOption, match=rf"{name}='~nosuchuser/x'.*Write the directory out"):
        patch_grpo()
    assert not session.status()


@pytest.mark.parametrize("name", ["a.py", MANIFEST])
def test_a_fifo_in_the_cache_is_a_miss(cache, name):
    path = cache.write(KEY, "a.py", "", {}).with_name(name)
    path.unlink()
    os.mkfifo(path, mode=0o600)
    assert cache.read(KEY, "a.py") is None


def test_a_fifo_in_the_index_is_no_answer(cache):
    cache.write_index(KEY, b"{}")
    (cache.root / INDEX / KEY).unlink()
    os.mkfifo(cache.root / INDEX / KEY, mode=0o600)
    with pytest.raises(CacheRefused, match="not a regular file"):
        cache.read_index(KEY)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_a_deep_manifest_is_a_miss(cache, text):
    path = cache.write(KEY, "a.py", "", {})
    path.with_name(MANIFEST).write_text(text, encoding="utf-8")
    assert cache.read(KEY, "a.py") is None


def test_clear_deletes_the_index_and_size_counts_it(cache):
    cache.write_index(KEY, b"12345")
    keepsake = cache.root / INDEX / "mine"
    keepsake.touch()
    assert cache.size() == 5
    assert cache.clear() == 0
    assert [child.name for child in (cache.root / INDEX).iterdir()] == ["mine"]


def test_what_goes_while_it_is_looked_at_is_no_error(cache, monkeypatch):
    # Another process clears between the listing and each look.
    for key in (KEY, "b" * 64):
        cache.write(key, "a.py", "12345", {})
    listed = list(cache._entries())
    monkeypatch.setattr(cache, "_entries", lambda: listed)
    shutil.rmtree(listed[0])
    assert cache.size() > 5
    assert cache.clear() == 1
    assert (cache.size(), cache.clear()) == (0, 0)


def test_an_entry_that_is_being_written_stays(cache, monkeypatch):
    cache.write(KEY, "a.py", "12345", {})

    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert cache.clear() == 0


def test_an_entry_that_cannot_be_deleted_is_an_error(cache, monkeypatch):
    cache.write(KEY, "a.py", "12345", {})

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        cache.clear()


def test_writers_and_clear_and_size_at_once(cache):
    keys = [f"{number:064x}" for number in range(8)]
    complaints: list[BaseException] = []

    def repeat(call, times: int) -> None:
        try:
            for number in range(times):
                call(number)
        except BaseException as error:
            complaints.append(error)

    calls = [
        (lambda number: cache.write(keys[number % 8], "a.py", "x = 1\n" * 50, {}), 150),
        (lambda number: cache.write(keys[number % 8], "a.py", "x = 1\n" * 50, {}), 150),
        (lambda number: cache.read(keys[number % 8], "a.py"), 150),
        (lambda number: cache.clear(), 60),
        (lambda number: cache.clear(), 60),
        (lambda number: cache.size(), 60),
    ]
    threads = [threading.Thread(target=repeat, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert complaints == []
