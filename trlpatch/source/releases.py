"""TRL releases as tuples, and ranges over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from operator import ge, lt

from trlpatch.errors import UnparsableVersion

Release = tuple[int, ...]

OLDEST_SUPPORTED: Release = (0, 18, 0)
"""First release whose GRPOTrainer has an in-process engine (`vllm_mode="colocate"`)."""

NEWEST_TESTED: Release = (1, 16, 0)
"""Newest release in golden/releases.toml. A newer one is decided by its anchors, not by its number."""


_COMPARE = {">=": ge, "<": lt}


def parse_release(version: str) -> Release:
    """Return the three-part release tuple of a PEP 440 version: `"1.16.0.dev0"` gives `(1, 16, 0)`.

    Development and release-candidate builds count as the release they lead to, because their source has that
    release's shape. (packaging puts `1.10.0.dev0` in neither `>=1.10` nor `<1.10`.)

    Raises:
        UnparsableVersion: `version` is not PEP 440, such as the `"unknown"` that TRL 0.22.0 says of itself.
    """
    if _is_plain(version):
        return _padded(tuple(map(int, version.split("."))))
    # Only here, because packaging takes half of a warm start's time to import.
    from packaging.version import InvalidVersion, Version

    try:
        return _padded(Version(version).release)
    except InvalidVersion as error:
        raise UnparsableVersion(
            f"TRL says its version is {version!r}, which is not a PEP 440 version (expected such as '1.16.0'). "
            "Reinstall it: pip install --force-reinstall trl"
        ) from error


def _is_plain(version: str) -> bool:
    # Numbers and dots. Not a regular expression: compiling those takes a fifth of this module's import.
    return all(part.isdecimal() for part in version.split("."))


def _padded(release: Release) -> Release:
    return (*release, 0, 0, 0)[: max(3, len(release))]


def format_release(release: Release) -> str:
    """Return `"1.16.0"` for `(1, 16, 0)`."""
    return ".".join(map(str, release))


class ReleaseRange:
    """A range such as `">=0.18,<0.25"`: PEP 440 text with `>=` and `<` only, tested against release tuples.

    Raises:
        ValueError: at the first test, if the text has other bounds.
    """

    # A plain class for the reason that `trlpatch.outcomes` gives.
    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def _bounds(self) -> list[tuple[Callable[[Release, Release], bool], Release]]:
        return [self._bound(part) for part in self.text.split(",")]

    def _bound(self, part: str) -> tuple[Callable[[Release, Release], bool], Release]:
        for symbol, compare in _COMPARE.items():
            version = part.removeprefix(symbol)
            if version != part and _is_plain(version):
                return compare, _padded(tuple(map(int, version.split("."))))
        raise ValueError(f"release range {self.text!r}: expected bounds such as '>=0.18' and '<0.25'")

    def __contains__(self, release: Release) -> bool:
        return all(compare(release, bound) for compare, bound in self._bounds)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"ReleaseRange({self.text!r})"
