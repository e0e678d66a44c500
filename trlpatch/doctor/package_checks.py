"""Checks of the installed packages: Python, TRL, and the versions that have to fit each other."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.version import InvalidVersion, Version

from trlpatch.compatibility.verdict import Verdict, installed, judge
from trlpatch.doctor.checks import Level, Result
from trlpatch.doctor.machine import Machine
from trlpatch.errors import TrlpatchError
from trlpatch.source.locate import TrlInstall, find_trl
from trlpatch.source.releases import NEWEST_TESTED
from trlpatch.versions import pip_install

_LEVELS: dict[str, Level] = {"tested": "ok", "untested": "warn", "incomplete": "fail", "known-bad": "fail"}

_OLDEST = {
    "torch": "2.4",
    "transformers": "4.45",
    "peft": "0.10",
    "bitsandbytes": "0.43.3",
    "triton": "3.0",
    "vllm": "0.8.5",
    "ray": "2.49.2",
}
"""Below these nothing of today's TRL runs; whether versions fit each other is the verdict's to say."""


def package_checks(machine: Machine) -> Iterator[Result]:
    """Yield the results for the installed packages; TRL is found as `PatchFastRL()` finds it, and not imported."""
    yield _python(machine)
    try:
        install = find_trl()
    except TrlpatchError as error:
        found, _, command = str(error).partition(" Run: ")
        yield Result("TRL", "fail", found, command=command)
        yield from _missing(machine, "torch", "vllm", "transformers")
    else:
        yield _trl(install)
        yield from _versions(judge(install, installed()))
    yield from _missing(machine, "peft", level="warn", needed_by="LoRA, and FastLanguageModel, need it; ")
    yield from _old(machine)


def _python(machine: Machine) -> Result:
    shown = ".".join(map(str, machine.python))
    if machine.python < (3, 11):
        return Result("Python", "fail", shown, "trlpatch and TRL from 1.15 on need 3.11 or newer")
    return Result("Python", "ok", shown)


def _trl(install: TrlInstall) -> Result:
    if install.release > NEWEST_TESTED:
        return Result(
            "TRL",
            "warn",
            f"{install.version}, newer than every tested release",
            "see whether every patch fits",
            "trlpatch check",
        )
    sleeps = "" if install.release >= (0, 23, 0) else "sleep mode and its patches begin with TRL 0.23"
    return Result("TRL", "info" if sleeps else "ok", install.version, sleeps)


def _versions(verdict: Verdict) -> Iterator[Result]:
    state, *lines = verdict.lines()
    if verdict.suggestion:
        lines.pop()
    level = _LEVELS[verdict.state]
    if verdict.state == "incomplete" and verdict.versions.get("vllm") is None:
        yield Result(
            "vLLM",
            "fail",
            "not installed",
            "fast_inference=True builds a vLLM engine",
            pip_install("vllm"),
        )
    yield Result("versions", level, state, " ".join(filter(None, lines)), verdict.suggestion)


def _missing(machine: Machine, *names: str, level: Level = "fail", needed_by: str = "") -> Iterator[Result]:
    missing = [name for name in names if machine.packages.get(name) is None]
    if missing:
        others = " ".join(name for name in missing if name != "vllm")
        command = f"{pip_install('vllm')} {others}".rstrip() if "vllm" in missing else f"pip install {others}"
        yield Result(", ".join(missing), level, "not installed", f"{needed_by}docs/quickstart.md", command)


def _old(machine: Machine) -> Iterator[Result]:
    for name, oldest in _OLDEST.items():
        version = machine.packages.get(name)
        try:
            old = version is not None and Version(version) < Version(oldest)
        except InvalidVersion:
            continue
        if old:
            yield Result(name, "warn", f"{version}", f"older than {oldest}", f"pip install --upgrade {name}")
