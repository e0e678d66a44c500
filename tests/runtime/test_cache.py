from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.helpers import SKIP
from trlpatch import errors
from trlpatch.runtime import cache as caching
from trlpatch.runtime import session
from trlpatch.runtime.cache import MANIFEST, Cache, entry_key

KEY = "a" * 64


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def cached_entries(root: Path) -> list[Path]:
    return sorted((root / "v1").iterdir())


def test_what_was_written_is_read_back(cache):
    path = cache.write(KEY, "grpo_trainer.py", "text = 'ü'\n", {"touched": ["A.b"]})
    stored = cache.read(KEY, "grpo_trainer.py")
    assert stored is not None
    assert (stored.path, stored.text, stored.manifest["touched"]) == (path, "text = 'ü'\n", ["A.b"])
    assert path == cache.root / "v1" / KEY / "grpo_trainer.py"


def test_directories_are_private(cache):
    path = cache.write(KEY, "a.py", "", {})
    for directory in (path.parent, path.parent.parent, cache.root):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0


def test_no_temporary_files_are_left(cache):
    path = cache.write(KEY, "a.py", "", {})
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.py", MANIFEST]


def test_manifest_comes_last(cache, monkeypatch):
    published = []
    publish = caching.publish
    monkeypatch.setattr(
        caching, "publish", lambda path, content: (published.append(path.name), publish(path, content))
    )
    cache.write(KEY, "a.py", "", {})
    assert published == ["a.py", MANIFEST]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _other_key(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    (directory / MANIFEST).write_text(json.dumps({**manifest, "key": "b" * 64}), encoding="utf-8")


DAMAGE = {
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "no file": lambda entry: (entry / "a.py").unlink(),
    "truncated file": lambda entry: _truncate(entry / "a.py"),
    "truncated manifest": lambda entry: _truncate(entry / MANIFEST),
    "empty manifest": lambda entry: (entry / MANIFEST).write_bytes(b""),
    "binary manifest": lambda entry: (entry / MANIFEST).write_bytes(b"\xff\x00\xff"),
    "manifest is a list": lambda entry: (entry / MANIFEST).write_bytes(b"[]"),
    "manifest without hash": lambda entry: (entry / MANIFEST).write_bytes(b'{"format": "v1"}'),
    "manifest of another entry": _other_key,
    "changed file": lambda entry: (entry / "a.py").write_bytes(b"import os\n"),
    "group may write": lambda entry: entry.chmod(0o770),
    "all may write the root": lambda entry: entry.parent.parent.chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_a_miss_with_a_debug_line(cache, damage, caplog):
    path = cache.write(KEY, "a.py", "import sys\n", {})
    assert cache.read(KEY, "a.py") is not None
    damage(path.parent)
    with caplog.at_level("DEBUG", "trlpatch.cache"):
        assert cache.read(KEY, "a.py") is None
    assert str(path.parent) in caplog.text


@pytest.mark.parametrize("place", ["root", "entry"])
def test_directories_of_others_are_refused(cache, monkeypatch, place):
    cache.write(KEY, "a.py", "", {})
    me = os.geteuid()
    if me == 0:
        os.chown(cache.root if place == "root" else cache.entry(KEY), 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert cache.read(KEY, "a.py") is None
    with pytest.raises(OSError, match="belongs to user"):
        cache.write(KEY, "a.py", "", {})


def test_a_file_of_somebody_else_is_a_miss(cache):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path = cache.write(KEY, "a.py", "", {})
    os.chown(path, 12345, -1)
    assert cache.read(KEY, "a.py") is None


def test_writable_by_others_says_what_to_run(cache):
    cache.root.mkdir(mode=0o700)
    cache.root.chmod(0o777)
    with pytest.raises(OSError, match="chmod 700"):
        cache.write(KEY, "a.py", "", {})


def test_clear_and_size_count_entries_only(cache):
    cache.write(KEY, "a.py", "12345", {})
    cache.write("b" * 64, "a.py", "12345", {})
    keepsake = cache.root / "v1" / "mine"
    keepsake.mkdir()
    assert cache.size() > 10
    assert cache.clear() == 2
    assert cache.size() == 0
    assert keepsake.exists()
    assert Cache(cache.root / "nowhere").clear() == 0


def test_root_is_the_override_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(tmp_path / "here"))
    assert caching.path() == tmp_path / "here"
    monkeypatch.delenv("TRLPATCH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caching.path() == tmp_path / "xdg" / "trlpatch"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert caching.path() == tmp_path / ".cache" / "trlpatch"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere platformdirs itself is asked")
@pytest.mark.parametrize("xdg", ["", "/somewhere/else", "relative"])
def test_root_is_what_platformdirs_says(monkeypatch, xdg):
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    if xdg != "relative":  # platformdirs takes a relative one as it is, against the XDG specification
        assert caching.path() == caching._platform_root()
    assert caching.path().is_absolute()


def test_every_part_decides_the_key():
    base = {"target": "grpo", "release": (1, 9, 2), "upstream_sha256": "0", "skip": ("a", "b"), "rules": "r"}
    other = {"target": "rloo", "release": (1, 9, 3), "upstream_sha256": "1", "skip": ("a",), "rules": "s"}
    keys = [entry_key(**{**base, name: other[name]}) for name in base]
    assert len({entry_key(**base), *keys}) == 6
    assert entry_key(**{**base, "skip": ("b", "a")}) == entry_key(**base)


def test_warm_start_reads_and_does_not_rewrite(fake_trl, patch_grpo, monkeypatch):
    cold = patch_grpo()
    assert set(cold.cache.values()) == {"miss"}
    session.revert()
    monkeypatch.setitem(sys.modules, "trlpatch.rewrite.rewriter", None)  # importing it fails now
    warm = patch_grpo()
    assert set(warm.cache.values()) == {"hit"}
    assert warm.entries == cold.entries
    assert warm.files == cold.files


def test_upstream_that_changed_is_a_miss(fake_trl, patch_grpo):
    patch_grpo()
    session.revert()
    with (fake_trl.root / "trainer/grpo_trainer.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert patch_grpo().cache == {"grpo": "miss", "grpo_config": "hit"}


def test_a_damaged_entry_is_made_anew(fake_trl, patch_grpo):
    report = patch_grpo()
    session.revert()
    file = Path(report.files["grpo"])
    good = file.read_text(encoding="utf-8")
    file.write_text("raise SystemExit('this must not run')\n", encoding="utf-8")
    assert patch_grpo().cache["grpo"] == "miss"
    assert file.read_text(encoding="utf-8") == good
    import trl

    assert trl.GRPOTrainer("model").step() == "step"


def test_manifest_with_a_wrong_shape_is_made_anew(fake_trl, patch_grpo):
    report = patch_grpo()
    session.revert()
    path = Path(report.files["grpo"]).with_name(MANIFEST)
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, "outcomes": [{"unknown": 1}]}), encoding="utf-8")
    assert patch_grpo().cache["grpo"] == "miss"


def _runs_from_memory(patch_grpo) -> None:
    with pytest.warns(errors.CacheUnavailable, match="TRLPATCH_CACHE_DIR") as caught:
        report = patch_grpo()
    assert len([one for one in caught if one.category is errors.CacheUnavailable]) == 1
    assert set(report.cache.values()) == {"memory"}
    import inspect
    import traceback

    import trl

    assert "_trlpatch.configure" in inspect.getsource(trl.GRPOTrainer)
    assert "_trlpatch.configure" in inspect.getsource(trl.GRPOTrainer.__init__)
    assert Path(inspect.getfile(trl.GRPOTrainer)).name == "grpo_trainer.py"
    with pytest.raises(RuntimeError) as raised:
        trl.GRPOTrainer("bad")
    assert 'raise RuntimeError("bad model")' in "".join(traceback.format_exception(raised.value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch_grpo() is report


def test_full_disk_runs_from_memory(fake_trl, patch_grpo, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(caching, "publish", full)
    _runs_from_memory(patch_grpo)


def test_disk_that_fills_up_while_writing_leaves_nothing_half_written(cache, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write(KEY, "a.py", "text", {})
    assert list(cache.entry(KEY).iterdir()) == []


def test_cache_that_is_a_file_runs_from_memory(fake_trl, patch_grpo):
    fake_trl.cache.write_text("")
    _runs_from_memory(patch_grpo)


def test_refused_directory_runs_from_memory(fake_trl, patch_grpo):
    fake_trl.cache.mkdir()
    fake_trl.cache.chmod(0o777)
    _runs_from_memory(patch_grpo)


def test_read_only_cache_runs_from_memory(fake_trl, patch_grpo, monkeypatch):
    fake_trl.cache.mkdir(mode=0o500)
    if os.geteuid() == 0:  # modes do not stop root; a read-only file system would
        mkdir = Path.mkdir

        def refuse(self, *arguments, **keywords):
            if fake_trl.cache in self.parents:
                raise OSError(errno.EROFS, "Read-only file system", str(self))
            mkdir(self, *arguments, **keywords)

        monkeypatch.setattr(Path, "mkdir", refuse)
    _runs_from_memory(patch_grpo)


def test_read_only_but_filled_cache_is_used(fake_trl, patch_grpo, monkeypatch):
    patch_grpo()
    session.revert()

    def refuse(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(caching, "publish", refuse)
    assert set(patch_grpo().cache.values()) == {"hit"}


def test_nothing_is_written_to_the_working_directory(fake_trl, patch_grpo, monkeypatch, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    patch_grpo()
    importlib_name = "trl.trainer.grpo_trainer"
    __import__(importlib_name)
    assert list(here.iterdir()) == []


def test_cleared_between_patching_and_importing(fake_trl, patch_grpo):
    patch_grpo()
    assert caching.clear() == 2
    import inspect

    import trl

    assert "_trlpatch.configure" in inspect.getsource(trl.GRPOTrainer)


RANK = f"""
import sys, trlpatch
report = trlpatch.PatchFastRL("grpo", skip={SKIP!r})
import trl
assert trl.GRPOTrainer("model").step() == "step"
assert "_trlpatch" in vars(sys.modules["trl.trainer.grpo_trainer"])
print(*sorted(report.cache.values()), "libcst" in sys.modules)
"""


def test_eight_processes_at_once_then_a_warm_one(fake_trl):
    fake_trl.settle()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=fake_trl.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for rank in ranks:
        _, complaints = rank.communicate(timeout=300)
        assert rank.returncode == 0, complaints
        assert complaints == ""
    assert len(cached_entries(fake_trl.cache)) == 2
    leftovers = [file for entry in cached_entries(fake_trl.cache) for file in entry.glob(".*")]
    assert leftovers == []
    warm = fake_trl.python(RANK)
    assert warm.stdout.split() == ["hit", "hit", "False"], warm.stderr
