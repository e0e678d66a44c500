"""A sample of the campaign, with every kind that once survived: no mutant is silent, no harmless one is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.mutation import __main__ as command_line
from tests.mutation import campaign, engine_reading, executed, hosts, mutants
from tests.mutation.composed import composed
from tests.mutation.mutants import Mutant
from tests.mutation.verdicts import Judged, attempt, judge, lay_out
from trlpatch.preview import preview

SAMPLE = 220
SEED = 20261127
CHEAP = ("0.18.2", "0.29.1", "1.9.2", "1.16.0")
"""Releases with a host that takes a tenth of a second to rewrite."""


def _sampled() -> list[Mutant]:
    return mutants.sample(mutants.sites(), SAMPLE, SEED)


def _fault(judged: Judged) -> str:
    return campaign.explained(judged) if judged.verdict in campaign.FAULTS else ""


@pytest.fixture(scope="module")
def sample() -> list[Mutant]:
    return _sampled()


def test_a_sample_of_the_campaign_has_no_silent_mutant_and_no_false_alarm(sample: list[Mutant]) -> None:
    judged = list(campaign.run(sample))
    print(campaign.table(judged))
    assert not [fault for one in judged if (fault := _fault(one))]
    assert sum(one.verdict == "unproven" for one in judged) <= SAMPLE // 20


def test_the_sample_has_all_categories_and_all_former_survivors(sample: list[Mutant]) -> None:
    assert {mutant.category for mutant in sample} == set(mutants.CATEGORIES)
    assert {mutant.release for mutant in sample} == set(hosts.RELEASES)
    survivors = {name for name, one in mutants.every_kind().items() if one.former_survivor}
    assert survivors <= {mutant.kind for mutant in sample}


def test_a_sample_is_the_same_every_time(sample: list[Mutant]) -> None:
    assert [mutant.name for mutant in _sampled()] == [mutant.name for mutant in sample]


def test_every_kind_says_what_it_imitates_and_makes_mutants() -> None:
    for one in mutants.every_kind().values():
        assert one.imitates.endswith("."), one.name
        made = mutants.generate(mutants.sites(("1.16.0", "0.29.1", "0.26.2"), kinds=[one.name]))
        assert next(made, None), f"{one.name} changes nothing in any host"


@pytest.mark.parametrize("release", hosts.RELEASES)
def test_the_oracles_are_clean_on_upstream(release: str) -> None:
    for host in (*hosts.rollout_hosts(release), *hosts.standing_hosts(release)):
        judged = judge(Mutant("upstream", "B", release, host.name, 0, {host.path: host.text}, harmless=True))
        assert (judged.verdict, judged.reasons) == ("routed", ()), host.path


@pytest.mark.parametrize("release", hosts.RELEASES)
def test_a_sync_that_may_not_hand_over_pushes_among_the_stubs(release: str) -> None:
    for host in hosts.rollout_hosts(release):
        _, patched = attempt(Mutant("upstream", "B", release, host.name, 0, {host.path: host.text}))
        pushed = executed.pushes(patched[host.path])
        assert all(pushed.values()), f"{host.path}: {pushed}"
        assert bool(pushed) == (host.sync is not None), host.path


BROKEN = {
    "a rollout without the adapter": ("lora_request=_trlpatch.lora_request(self, self.llm)", "lora_request=None"),
    "a push without a hand-over": ("if _trlpatch.hand_over(self):", "if False:"),
    "a sleep past the hooks": ("_trlpatch.sleep(self, self.llm, level=2)", "self.llm.sleep(level=2)"),
    "an engine past the hook": ("_trlpatch.engine(self, model, LLM)(", "LLM("),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_both_oracles_see_a_broken_rewrite(broken: str) -> None:
    host = next(hosts.rollout_hosts("1.16.0"))
    _, patched = attempt(Mutant("upstream", "B", host.release, host.name, 0, {host.path: host.text}))
    right, wrong = BROKEN[broken]
    assert right in patched[host.path]
    text = patched[host.path].replace(right, wrong)
    assert engine_reading.judge(text)
    assert executed.judge(text, host.text, host.text).wrong


@pytest.mark.parametrize("kind", ["second_generate", "new_trainer_rolls_out", "trailing_comment", "use_vllm_renamed"])
def test_the_shortcut_says_what_a_preview_of_the_whole_tree_says(kind: str, tmp_path: Path) -> None:
    mutant = next(mutants.generate(mutants.sites(["0.18.2"], kinds=[kind])))
    lay_out(mutant, tmp_path / "tree")
    assert bool(preview(tmp_path / "tree").failures) == bool(attempt(mutant)[0])


@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_harmless_changes_together_are_harmless(data: st.DataObject) -> None:
    mutant = data.draw(composed(data.draw(st.sampled_from(CHEAP))))
    assert not _fault(judge(mutant))


@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_a_harmful_change_among_harmless_ones_is_not_silent(data: st.DataObject) -> None:
    mutant = data.draw(composed(data.draw(st.sampled_from(CHEAP)), harmful="AZRS"))
    assert judge(mutant).verdict != "silent", campaign.explained(judge(mutant))


def test_the_command_line_prints_a_table_and_writes_lines_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert command_line.main(["--release", "1.16.0", "--kind", "removed", "--json", str(out)]) == 0
    assert "killed" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["killed"]


def test_a_fault_is_told_with_its_change_and_its_reasons() -> None:
    mutant = next(mutants.generate(mutants.sites(["1.16.0"], kinds=["second_generate"])))
    told = campaign.explained(Judged(dataclasses.replace(mutant), "silent", ("because",)))
    assert "because" in told
    assert "+        return self.llm.generate(prompts, sampling_params)" in told
