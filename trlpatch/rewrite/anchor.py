"""Anchor: a place in TRL's source that a patch must find, with the patterns by which it is searched and reported."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Anchor:
    """A place in TRL's source that a patch must find.

    Attributes:
        name: what it is called in reports and manifests.
        hint: loose regular expression, for lines to show when the anchor is not where it was expected.
        sign: tells whether a node of the syntax tree is the anchor, not yet patched. A target declared free of the
            patch must hold no such node, one with the patch none afterwards, in whatever class or function; None where
            the anchor is harmless elsewhere. Docstrings and comments are no nodes that a sign can be.
        prefilter: texts of which every statement holding this anchor contains one. Other statements are not parsed.
            Empty for the anchors of an inserter.
        at_module_level: it stands outside every class and function, where it may only be replaced by one statement.
    """

    name: str
    hint: str
    sign: Callable[[ast.AST], bool] | None = None
    prefilter: tuple[str, ...] = ()
    at_module_level: bool = False
