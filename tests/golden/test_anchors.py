"""The rewriter finds exactly the places that an independent count finds, in every pinned release.

tests/golden/anchors.json holds the expected numbers. They come from tests/golden/survey.py, which shares no code with
the rewriter: it walks every module of the package with `ast` and counts, by shape,

* engine: calls of the name `LLM`;
* rollout: `.generate(...)` and `.chat(...)` on anything whose last name is `llm` or `vllm_engine`;
* sleep, wake, reload: `.sleep`, `.wake_up` and `.collective_rpc("reload_weights")` on the same receivers;
* sync: definitions of `_move_model_to_vllm` and `sync_weights` beside any of the others;
* push: `.load_weights(<...>.state_dict()...)`, OnlineDPO's whole synchronisation below 0.23;
* sampling_params, generation: calls of the names `SamplingParams` and `VLLMGeneration`.

Modules that never hold an engine of the training process are named in survey.NOT_IN_PROCESS. The numbers were also
compared, release by release, with a survey of TRL made before the rewriter existed.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.golden.sources import pinned
from tests.golden.survey import Counts, survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from trlpatch.preview import Preview

ANCHORS: dict[str, Counts] = json.loads(Path(__file__).with_name("anchors.json").read_text(encoding="utf-8"))

KINDS = {
    ("engine_reuse", "engine_constructor"): "engine",
    ("live_adapter", "rollout_call"): "rollout",
    ("adapter_sync", "sync_method"): "sync",
    ("adapter_sync", "state_dict_push"): "push",
    ("sleep", "sleep_call"): "sleep",
    ("sleep", "wake_call"): "wake",
    ("sleep", "reload_call"): "reload",
    ("sampling", "sampling_params"): "sampling_params",
    ("sampling", "vllm_generation"): "generation",
}
"""Anchor of the rewriter -> kind of the survey."""

INSERTED = {
    ("configure", "init"),
    ("sampling_config", "last_field"),
    ("sampling_config", "post_init"),
    ("sleep", "rollout_without_sleep"),
}
"""Anchors where the rewriter adds something that TRL does not have, so there is nothing to count."""


def test_survey_counts_what_is_expected(version: str, trl_tree: Callable[[str], Path]) -> None:
    assert survey(trl_tree(version) / "trl") == ANCHORS[version]


def test_rewriter_finds_what_is_expected(version: str, previewed: Callable[[str], Preview]) -> None:
    found: Counts = {}
    for file in previewed(version).files:
        counts: Counter[str] = Counter()
        for outcome in file.rewritten.outcomes:
            for anchor, count in outcome.anchors.items():
                if (outcome.patch, anchor) not in INSERTED:
                    counts[KINDS[outcome.patch, anchor]] += count
        if +counts:
            found[file.name] = dict(sorted((+counts).items()))
    assert found == ANCHORS[version]


def test_every_pinned_release_has_expected_counts() -> None:
    assert ANCHORS.keys() == pinned().keys()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("self.llm = LLM(model=name)", {"engine": 1}),
        ("trainer.vllm_generation.llm.generate(f(1), g(x=(2,)))", {"rollout": 1}),
        ("self.vllm_engine.chat(messages)", {"rollout": 1}),
        ("model.generate(ids)", {}),
        ("self.llm.collective_rpc('close')", {}),
        ("self.llm.collective_rpc(\n    'reload_weights'\n)", {"reload": 1}),
        ("def sync_weights(self): self.llm.wake_up()", {"sync": 1, "wake": 1}),
        ("def sync_weights(self): ...", {}),
        ("vllm_model.load_weights(m.state_dict().items())\nself.llm.generate(p)", {"push": 1, "rollout": 1}),
    ],
)
def test_survey_counts_shapes(source: str, expected: dict[str, int], tmp_path: Path) -> None:
    module = tmp_path / "trl" / "trainer" / "some_trainer.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"# vllm\n{source}\n", encoding="utf-8")
    assert survey(tmp_path / "trl") == ({"trl/trainer/some_trainer.py": expected} if expected else {})
