"""Requirements that the installed distributions have of each other, read from their metadata."""

from __future__ import annotations

import platform
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from trlpatch.compatibility.known_bad import within
from trlpatch.versions import installed_distribution

ENFORCED = {"trl": ("transformers", "accelerate", "peft"), "vllm": ("transformers", "torch")}
"""Requirements that break something when they are not met. TRL's range of vLLM is not one: TRL only warns."""


@dataclass(frozen=True)
class UnmetRequirement:
    """A requirement of one distribution that what is installed does not meet.

    Attributes:
        owner: whose metadata says it.
        about: the package it is about, or "python".
        text: the requirement and what is there.
    """

    owner: str
    about: str
    text: str


def unmet_requirements(trl: Path, installed: Mapping[str, str | None]) -> Iterator[UnmetRequirement]:
    """Yield what TRL and vLLM require and do not get.

    Args:
        trl: the `trl` package, with its metadata beside it, or a wheel. Without metadata nothing is known.
        installed: versions by distribution.
    """
    for owner, distribution in (("trl", distribution_of(trl)), ("vllm", installed_distribution("vllm"))):
        if distribution is None or installed.get(owner) is None:
            continue
        here = {**installed, "python": platform.python_version()}
        required = [("python", ranges) for ranges in _python_range(distribution)]
        required += [(name, ranges) for name in ENFORCED[owner] for ranges in _ranges(distribution, name)]
        for name, ranges in required:
            if here.get(name) is not None and not within(here[name], ranges):
                said = f"{owner} {installed[owner]} demands {name}{ranges}, and {here[name]} is there."
                yield UnmetRequirement(owner, name, said)


def vllm_range(trl: Path) -> str:
    """Return the range of vLLM that this TRL declares in its extra, such as `<=0.31.0,>=0.22.0`; empty if unknown."""
    distribution = distribution_of(trl)
    return next(iter(_ranges(distribution, "vllm")), "") if distribution else ""


def distribution_of(trl: Path) -> Distribution | None:
    """Return the metadata of the wheel `trl`, or the metadata beside the package `trl`; None where there is none."""
    if trl.is_file():
        with zipfile.ZipFile(trl) as wheel:
            infos = {name.partition("/")[0] for name in wheel.namelist() if name.endswith(".dist-info/METADATA")}
        return PathDistribution(zipfile.Path(trl, f"{min(infos)}/")) if infos else None
    info = next(iter(sorted(trl.parent.glob("trl-*.dist-info"))), None)
    return Distribution.at(info) if info and (info / "METADATA").is_file() else None


def _ranges(distribution: Distribution, name: str) -> Iterator[str]:
    environment = {str(key): str(value) for key, value in default_environment().items()}
    for line in _lines(distribution):
        with suppress(ValueError):  # what is not PEP 508 says nothing
            requirement = Requirement(line)
            if requirement.name.lower().replace("_", "-") != name or not requirement.specifier:
                continue
            # `peft` and `vllm` are extras of TRL that go by their own name; no other extra was asked for.
            if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": name}):
                yield str(without_local(requirement.specifier))


def _lines(distribution: Distribution) -> list[str]:
    with suppress(UnicodeDecodeError):
        return distribution.requires or []
    return []


def _python_range(distribution: Distribution) -> Iterator[str]:
    with suppress(ValueError):  # not UTF-8, or not PEP 440
        ranges = distribution.metadata["Requires-Python"] or ""
        SpecifierSet(ranges)
        yield ranges


def without_local(specifiers: SpecifierSet) -> SpecifierSet:
    """Return the same ranges of public versions.

    `==2.11.0+cpu` and `==2.11.0` ask for the same release of torch, built for different machines.
    """
    return SpecifierSet(",".join(str(specifier).partition("+")[0] for specifier in specifiers))
