"""Versions that do not work together, whatever trlpatch does; what a patch cures is not among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class Rule:
    """A combination that fails.

    Attributes:
        versions: PEP 440 range per distribution; the rule holds where every one of them is installed and in its range.
        reason: what happens, in words that need no context.
        source: where upstream says so.
    """

    versions: Mapping[str, str]
    reason: str
    source: str

    def holds(self, installed: Mapping[str, str | None]) -> bool:
        """Tell whether the installed versions are all in the rule's ranges."""
        return all(within(installed.get(name), ranges) for name, ranges in self.versions.items())


RULES: tuple[Rule, ...] = (
    Rule(
        {"vllm": ">=0.24", "transformers": "<5"},
        "vLLM 0.24 and newer refuse transformers 4 when they are imported.",
        "https://github.com/vllm-project/vllm/pull/45161",
    ),
    Rule(
        {"vllm": "<0.19.1", "transformers": ">=5"},
        "vLLM before 0.19.1 needs transformers 4.",
        "https://github.com/vllm-project/vllm/pull/30566",
    ),
    Rule(
        {"vllm": ">=0.19.1,<0.24", "transformers": ">=5,<5.5.1"},
        "vLLM 0.19.1 to 0.23 work with transformers 4 and from 5.5.1 on, not with what is between.",
        "https://github.com/vllm-project/vllm/pull/30566",
    ),
    Rule(
        {"trl": ">=1.1", "vllm": "<0.11"},
        "TRL 1.1 and newer import `StructuredOutputsParams`, which came with vLLM 0.11.",
        "https://github.com/vllm-project/vllm/pull/22772",
    ),
    Rule(
        {"trl": "<0.27", "transformers": ">=5", "peft": "<0.18"},
        "peft before 0.18 imports `HybridCache`, which transformers 5 does not have; TRL supplies it from 0.27 on.",
        "https://github.com/huggingface/peft/pull/2735",
    ),
)


def within(version: str | None, ranges: str) -> bool:
    """Tell whether `version` is in a PEP 440 range; local parts (`+cu130`) do not count, pre-releases do.

    A version that is not PEP 440, such as a build of someone's own, is in no range.
    """
    try:
        return version is not None and SpecifierSet(ranges).contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        return False
