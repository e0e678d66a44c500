"""tox.ini as tests read it."""

from __future__ import annotations

import configparser
import re
from itertools import product

from tests.golden.sources import ROOT


def tox() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    return parser


def expand(name: str) -> list[str]:
    """Return the tox environments of a generative name: `a{1,2}-b` gives a1-b, a2-b."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    return ["".join(choice) for choice in product(*parts)]


def environments() -> dict[str, str]:
    """Return the section that defines each environment."""
    sections = [section for section in tox().sections() if section.startswith("testenv:")]
    return {name: section for section in sections for name in expand(section.removeprefix("testenv:"))}


def default_environments() -> set[str]:
    """Return what a plain `tox` runs."""
    return {name for line in tox()["tox"]["env_list"].split() for name in expand(line)}
