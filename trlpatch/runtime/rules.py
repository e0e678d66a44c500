"""Rules: the sources of trlpatch that turn upstream text into patched text, told apart without importing them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent

RULES = ("outcomes.py", "trl_names.py", "rewrite", "source")
"""The files and folders of the package that decide patched text.

Of what the rewriter imports, `trlpatch.errors` alone is not among them: it decides messages.
"""


def rules_digest() -> str:
    """Return a digest of all that turns upstream text into patched text, computed without importing any of it.

    Covers all that `trlpatch.rewrite` is made of and imports, the version of trlpatch and that of libcst.
    """
    digest = hashlib.sha256("\0".join(rules_versions()).encode())
    for name in _rules():
        digest.update(f"\0{name}\0".encode())
        with open(f"{_PACKAGE}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 - pathlib doubles the time
            digest.update(file.read())
    return digest.hexdigest()


def rules_versions() -> tuple[str, ...]:
    """Return the versions of the distributions that the rules are made of, as their metadata directories say them."""
    return _versions("trlpatch", "libcst")


def rule_places() -> list[str]:
    """Return the paths of all sources in RULES, and of those that read and write what is kept about them."""
    return [f"{_PACKAGE}/{name}" for name in (*_rules(), *_modules_in("runtime"))]


def _rules() -> Iterator[str]:
    """Yield the sources in RULES, relative to the package."""
    for name in RULES:
        yield from [name] if name.endswith(".py") else _modules_in(name)


def _modules_in(folder: str) -> Iterator[str]:
    for entry in sorted(os.scandir(_PACKAGE / folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _modules_in(f"{folder}/{entry.name}")
        elif entry.name.endswith(".py"):
            yield f"{folder}/{entry.name}"


def _versions(*distributions: str) -> tuple[str, ...]:
    # The name of the dist-info directory holds the version; importlib.metadata costs 30 ms to import.
    found: dict[str, str] = {}
    for place in sys.path:
        try:
            names = os.listdir(place or ".")  # noqa: PTH208 - pathlib doubles the time
        except OSError:
            continue
        infos = sorted(name for name in names if name.endswith(".dist-info"))
        for distribution in set(distributions) - found.keys():
            here = [name for name in infos if name.startswith(f"{distribution}-")]
            found.update((distribution, name) for name in here[:1])
        if len(found) == len(distributions):
            break
    return tuple(found.get(distribution, f"{distribution} without metadata") for distribution in distributions)
