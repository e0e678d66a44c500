"""TRL releases as tuples, and ranges over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from trlpatch.errors import UnparsableVersion

Release = tuple[int, ...]

OLDEST_SUPPORTED: Release = (0, 18, 0)
"""First release whose GRPOTrainer has an in-process engine (`vllm_mode="colocate"`)."""

NEWEST_TESTED: Release = (1, 16, 0)
"""Newest release in golden/releases.toml. A newer one is decided by its anchors, not by its number."""


def parse_release(version: str) -> Release:
    """Return the three-part release tuple of a PEP 440 version: `"1.16.0.dev0"` gives `(1, 16, 0)`.

    Development and release-candidate builds count as the release they lead to, because their source has that
    release's shape. (packaging puts `1.10.0.dev0` in neither `>=1.10` nor `<1.10`.)

    Raises:
        UnparsableVersion: `version` is not PEP 440, such as the `"unknown"` that TRL 0.22.0 says of itself.
    """
    try:
        release = Version(version).release
    except InvalidVersion as error:
        raise UnparsableVersion(
            f"TRL says its version is {version!r}, which is not a PEP 440 version (expected such as '1.16.0'). "
            "Reinstall it: pip install --force-reinstall trl"
        ) from error
    return (*release, 0, 0, 0)[: max(3, len(release))]


def format_release(release: Release) -> str:
    """Return `"1.16.0"` for `(1, 16, 0)`."""
    return ".".join(map(str, release))


@dataclass(frozen=True)
class ReleaseRange:
    """A PEP 440 range such as `">=0.18,<0.25"`, tested against release tuples."""

    text: str

    @cached_property
    def _specifiers(self) -> SpecifierSet:
        return SpecifierSet(self.text)

    def __contains__(self, release: Release) -> bool:
        return self._specifiers.contains(Version(format_release(release)))

    def __str__(self) -> str:
        return self.text
