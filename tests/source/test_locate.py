"""Finding TRL on disk. The small trees here have the shape of a TRL wheel; the golden tests use the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from trlpatch.errors import TrlNotFound, UnknownAlgorithm, UnparsableVersion, UnsupportedTrl
from trlpatch.source import locate
from trlpatch.source.algorithms import require_algorithm
from trlpatch.source.locate import find_trl, left_alone, missing, sources
from trlpatch.source.targets import ALGORITHMS, TARGETS


def make_trl(root: Path, version: str, *files: str) -> Path:
    package = root / "trl"
    for name in ("__init__.py", "trainer/__init__.py", *files):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("", encoding="utf-8")
    info = root / f"trl-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n", encoding="utf-8")
    return package


def test_the_package_directory_or_the_one_above_it(tmp_path: Path):
    package = make_trl(tmp_path, "1.9.2")
    assert find_trl(tmp_path) == find_trl(package)
    assert find_trl(package).release == (1, 9, 2)


def test_a_source_checkout_says_its_version_in_a_file(tmp_path: Path):
    (tmp_path / "trl/trainer").mkdir(parents=True)
    (tmp_path / "trl/__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "trl/VERSION").write_text("1.17.0.dev0\n", encoding="utf-8")
    assert find_trl(tmp_path).release == (1, 17, 0)


def test_no_trl_at_a_path(tmp_path: Path):
    with pytest.raises(TrlNotFound, match="pip download trl"):
        find_trl(tmp_path)


def test_no_version_at_all(tmp_path: Path):
    (tmp_path / "trl/trainer").mkdir(parents=True)
    with pytest.raises(TrlNotFound, match="does not say its version"):
        find_trl(tmp_path)


def test_no_trl_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TrlNotFound, match="pip install trl"):
        find_trl()


def test_too_old_says_what_works(tmp_path: Path):
    with pytest.raises(UnsupportedTrl, match=r"0\.17\.0.*0\.18\.0 to 1\.16\.0.*pip install -U trl"):
        find_trl(make_trl(tmp_path, "0.17.0"))


def test_a_version_that_is_none(tmp_path: Path):
    with pytest.raises(UnparsableVersion, match="'unknown'"):
        find_trl(make_trl(tmp_path, "unknown"))


def test_sources_of_one_algorithm(tmp_path: Path):
    files = ("trainer/grpo_trainer.py", "trainer/grpo_config.py", "trainer/rloo_trainer.py")
    install = find_trl(make_trl(tmp_path, "1.9.2", *files, "generation/vllm_generation.py"))
    assert [s.target.name for s in sources(install, "GRPO")] == ["vllm_generation", "grpo", "grpo_config"]
    assert sources(install, "grpo")[1].module == "trl.trainer.grpo_trainer"
    assert [target.name for target, _ in missing(install, "rloo")] == ["rloo_config", "vllm_client"]


@pytest.mark.parametrize("name", ["OnlineDPO", "online-dpo", "ONLINE_DPO", "OnlineDPOTrainer"])
def test_spellings_of_an_algorithm(name: str):
    assert "online_dpo" in locate.target_names(name)


def test_an_unknown_algorithm_lists_the_known_ones(tmp_path: Path):
    install = find_trl(make_trl(tmp_path, "1.9.2"))
    with pytest.raises(UnknownAlgorithm, match=r"'ppo'.*Known: .*grpo.*rloo"):
        sources(install, "ppo")
    with pytest.raises(UnknownAlgorithm, match=r"'gpro'; did you mean 'grpo'\?.*PatchFastRL\(\) patches all of them"):
        sources(install, "gpro")
    for stays_stock in ("sft", "DPOTrainer", "reward"):
        with pytest.raises(UnknownAlgorithm, match=f"'{stays_stock}': .*needs no patch") as caught:
            sources(install, stays_stock)
        assert "did you mean" not in str(caught.value)


def test_an_algorithm_that_this_release_lacks(tmp_path: Path):
    install = find_trl(make_trl(tmp_path, "0.20.0", "trainer/grpo_trainer.py"))
    with pytest.raises(UnknownAlgorithm, match=r"'rloo' has no trainer.*TRL 0\.20\.0.*grpo"):
        require_algorithm(install, "rloo")


@pytest.mark.parametrize(
    ("trl", "folder"), [("0.25.1", "trainer"), ("0.26.0", "experimental/{}"), ("1.13.0", "experimental/{}")]
)
def test_nash_md_and_xpo_are_left_alone_where_the_release_has_them(tmp_path: Path, trl: str, folder: str):
    files = [f"{folder.format(name)}/{name}_trainer.py" for name in ("nash_md", "xpo")]
    install = find_trl(make_trl(tmp_path, trl, *files))
    assert left_alone(install, TARGETS) == ["NashMDTrainer", "XPOTrainer"]
    assert left_alone(install, {"grpo", "grpo_config"}) == []
    (install.root / files[0]).unlink()
    assert left_alone(install, TARGETS) == ["XPOTrainer"]


def test_tables_name_only_targets_that_exist():
    assert {name for names in ALGORITHMS.values() for name in names} == set(TARGETS)
    assert {name for target in TARGETS.values() for name in target.coupled_with} <= set(TARGETS)
