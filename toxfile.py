"""tox environments that golden/releases.toml asks for; tox.ini has the rest.

For a release: `trl<release>-golden`, `trl<release>-cpu` on the stack that the table names, and, below 0.29,
`trl<release>-cpu5` on the newer stack. For a stack: `engine-<stack>`. A plain `tox` trains with the
releases that have `tier = "cpu"`.

Standard library and tox only: tox imports this file before it has installed anything.
"""

from __future__ import annotations

import tomllib
from configparser import RawConfigParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tox.config.loader.memory import MemoryLoader
from tox.config.types import Command, EnvList
from tox.plugin import impl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tox.config.sets import ConfigSet
    from tox.session.state import State

ROOT = Path(__file__).parent
TABLE: dict[str, Any] = tomllib.loads((ROOT / "golden" / "releases.toml").read_text(encoding="utf-8"))
_INI = RawConfigParser()
_INI.read(ROOT / "tox.ini", encoding="utf-8")
STACK_DEPS = _INI["stack"]["deps"].split()
NEWEST_STACK = TABLE["release"][-1]["cpu"]


def environments(arguments: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Return the environments of releases and stacks, each with what it has beside `[testenv]` of tox.ini."""
    found: dict[str, dict[str, Any]] = {}
    for stack, about in TABLE["stacks"].items():
        found[f"engine-{stack}"] = _on_stack(
            f"engine-{stack}", f"cpu tier, no trainer: {about['description']}", arguments
        )
    for release in TABLE["release"]:
        version = release["version"]
        found[f"trl{version}-golden"] = {
            "description": "golden tier, this release",
            "commands": [_command("pytest", "tests/golden", "--trl", version, *arguments)],
        }
        for suffix, stack in {"cpu": release["cpu"], NEWEST_STACK: NEWEST_STACK}.items():
            if suffix == "cpu" or stack != release["cpu"]:
                name, about = f"trl{version}-{suffix}", TABLE["stacks"][stack]["description"]
                found[name] = _on_stack(name, f"cpu tier, trainers of this release: {about}", arguments)
    return found


def by_default() -> list[str]:
    """Return those of them that a plain `tox` runs, after what env_list in tox.ini names."""
    trained = [release for release in TABLE["release"] if release["tier"] == "cpu"]
    return [*labels()["engine"], *(f"trl{release['version']}-cpu" for release in trained)]


def labels() -> dict[str, list[str]]:
    """Return what `tox -m <label>` runs.

    cpu: every release trains, on its own stack. cpu5: of the releases that a plain `tox` trains with, those of an
    older stack, on the newer one. engine: every stack.
    """
    older = [release for release in TABLE["release"] if release["tier"] == "cpu" and release["cpu"] != NEWEST_STACK]
    return {
        "cpu": [f"trl{release['version']}-cpu" for release in TABLE["release"]],
        "cpu5": [f"trl{release['version']}-{NEWEST_STACK}" for release in older],
        "engine": [f"engine-{stack}" for stack in sorted(TABLE["stacks"])],
    }


def _command(module: str, *arguments: str) -> Command:
    return Command(["python", "-m", module, *arguments])


def _on_stack(name: str, description: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Return an environment that is an interpreter for tests/cpu/stack.py, which has installations of its own."""
    return {
        "description": description,
        "base_python": ["python3.11"],  # that of the pins in tests/cpu
        "skip_install": True,
        "deps": STACK_DEPS,
        "set_env": {"PYTHONPATH": str(ROOT)},
        "commands": [_command("tests.cpu.stack", name, *arguments)],
    }


@impl
def tox_extend_envs() -> Iterable[str]:
    """Tell tox the names."""
    return environments()


@impl
def tox_add_core_config(core_conf: ConfigSet, state: State) -> None:
    """Give tox the settings, the rest of env_list, and the labels."""
    for name, settings in environments(state.conf.pos_args(None) or ()).items():
        state.conf.memory_seed_loaders[name].append(MemoryLoader(**settings))
    core_conf["env_list"].envs.extend(by_default())
    core_conf.loaders.insert(0, MemoryLoader(labels={name: EnvList(envs) for name, envs in labels().items()}))
