"""A tiny package named `trl`, with just enough in it for the real rewriter to patch two targets."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import SKIP
from tests.runtime import small_upstream
from tests.runtime.rebind_site import Site
from trlpatch.options import activate
from trlpatch.runtime import compat, index, session

REPOSITORY = Path(__file__).resolve().parents[2]
HOUR = 3600 * 10**9
"""In nanoseconds."""

GRPO_CONFIG = '''\
"""Config."""

from dataclasses import dataclass, field

from trl.trainer.base_config import BaseConfig


@dataclass
class GRPOConfig(BaseConfig):
    """Config of the tiny trainer."""

    beta: float = field(default=0.5, metadata={"help": "beta"})
    tags: list[str] = field(default_factory=list, metadata={"help": "tags"})

    def __post_init__(self):
        super().__post_init__()
        self.checked = True
'''

GRPO_TRAINER = '''\
"""Trainer."""

import functools

from trl.trainer.grpo_config import GRPOConfig


def profiling_decorator(func):
    @functools.wraps(func)
    def wrapper(self, *args, **kwargs):
        return func(self, *args, **kwargs)

    return wrapper


class Trainer:
    def __init__(self, model):
        self.model = model


class GRPOTrainer(Trainer):
    """A trainer."""

    def __init__(self, model, args=None):
        super().__init__(model)
        if model == "bad":
            raise RuntimeError("bad model")
        self.args = GRPOConfig() if args is None else args

    @profiling_decorator
    def step(self):
        return "step"

    def generate(self):
        return "generate"
'''

BASE_CONFIG = """\
from dataclasses import dataclass, field


@dataclass
class BaseConfig:
    output_dir: str = field(default="out")

    def __post_init__(self):
        self.base_checked = True
"""

DPPO_CONFIG = """\
from dataclasses import dataclass, field

from trl.trainer.grpo_config import GRPOConfig


class PlainConfig(GRPOConfig):
    pass


@dataclass
class DPPOConfig(PlainConfig):
    delta: float = field(default=0.1)
    many: dict[str, int] = field(default_factory=dict)
"""

INIT = """\
__version__ = "{version}"


def __getattr__(name):
    import importlib

    homes = {{"GRPOTrainer": "grpo_trainer", "GRPOConfig": "grpo_config", "DPPOConfig": "dppo_config"}}
    if name not in homes:
        raise AttributeError(name)
    return getattr(importlib.import_module("trl.trainer." + homes[name]), name)
"""


@dataclass
class FakeTrl:
    """The package's directory and what a test may do to it."""

    site: Path
    cache: Path

    @property
    def root(self) -> Path:
        return self.site / "trl"

    def settle(self) -> None:
        """Wait until the index records what is found in these files: not within two seconds of a change."""
        time.sleep(2.1)

    def write(self, file: str, text: str) -> Path:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def version(self, version: str) -> None:
        self.write("__init__.py", INIT.format(version=version))

    def drift(self) -> None:
        self.write("trainer/grpo_trainer.py", GRPO_TRAINER.replace("(self, model, args=None)", "(self, model, **kw)"))

    def python(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `code` in a new interpreter that sees this TRL and this repository's trlpatch."""
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=self.site,
        )

    def environment(self, **extra: str) -> dict[str, str]:
        path = os.pathsep.join([str(self.site), str(REPOSITORY)])
        return {**os.environ, "PYTHONPATH": path, "TRLPATCH_CACHE_DIR": str(self.cache), **extra}


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts import what they need: not coverage, which brings json and dataclasses with it."""
    for name in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def an_hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test wrote just now count as settled. (No call sets a ctime back.)"""
    now = time.time_ns
    monkeypatch.setattr(index.time, "time_ns", lambda: now() + HOUR)


@pytest.fixture
def fake_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrl]:
    """Put the package first on sys.path and forget afterwards that it was ever imported or patched."""
    fake = FakeTrl(tmp_path / "site", tmp_path / "cache")
    fake.version("0.25.0")
    fake.write("trainer/__init__.py", "")
    fake.write("trainer/base_config.py", BASE_CONFIG)
    fake.write("trainer/grpo_config.py", GRPO_CONFIG)
    fake.write("trainer/grpo_trainer.py", GRPO_TRAINER)
    fake.write("trainer/dppo_config.py", DPPO_CONFIG)
    aside = _forget_trl()
    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(fake.cache))
    monkeypatch.syspath_prepend(str(fake.site))
    yield fake
    if session._active is not None:
        session._active.finder.restore({})
    session._active = session._disabled = None
    activate(None)
    _forget_trl()
    sys.modules.update(aside)
    gc.collect()


def _forget_trl() -> dict[str, object]:
    names = [name for name in sys.modules if name == "trl" or name.startswith("trl.")]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def patch_grpo(fake_trl: FakeTrl) -> Callable[..., session.PatchReport]:
    """PatchFastRL("grpo") with the patches left out that the tiny trainer has no code for."""

    def call(**options: object) -> session.PatchReport:
        return session.PatchFastRL("grpo", **{"skip": SKIP, **options})  # type: ignore[arg-type]

    return call


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[small_upstream.Upstream]:
    small_upstream.write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("transformers", "trl")
    }
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    compat.remove()
    yield small_upstream.Upstream()
    compat.remove()
    for name in [name for name in sys.modules if name.split(".")[0] in ("transformers", "trl")]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(params=["imported before", "imported after"])
def accepting(upstream: small_upstream.Upstream, request: pytest.FixtureRequest) -> small_upstream.Upstream:
    if request.param == "imported before":
        upstream.import_all()
    compat.install("on")
    return upstream


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Site(tmp_path)
    yield made
    for name in made.names:
        sys.modules.pop(name, None)
