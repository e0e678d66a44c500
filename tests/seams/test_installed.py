"""What trlpatch uses of vLLM is there, in the vLLM of each stack; its sources are read, not imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.seams.check import failures
from tests.seams.tree import Tree

pytestmark = pytest.mark.cpu


def test_every_seam_holds_in_the_installed_vllm() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    tree = Tree.of(Path(spec.origin).parents[1])
    assert tree.version
    assert failures(tree) == []
