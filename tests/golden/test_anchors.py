"""The rewriter finds exactly the places that an independent count finds, in every pinned release.

tests/golden/anchors.json holds the expected numbers. They come from tests/golden/survey.py, also those that
`--golden-update` adds for a new release; what the rewriter finds is never written there. survey.py shares no code with
the rewriter: it walks every module of the package with `ast` and counts, by shape,

* engine: calls of the name `LLM`;
* rollout: `.generate(...)` and `.chat(...)` on anything whose last name is `llm` or `vllm_engine`;
* sleep, wake, reload: `.sleep`, `.wake_up` and `.collective_rpc("reload_weights")` on the same receivers;
* sync: definitions of `_move_model_to_vllm` and `sync_weights` beside any of the others;
* push: `.load_weights(<...>.state_dict()...)`, OnlineDPO's whole synchronisation below 0.23;
* sampling_params, generation: calls of the names `SamplingParams` and `VLLMGeneration`.

Modules that never hold an engine of the training process are named in survey.NOT_IN_PROCESS. The numbers were also
compared, release by release, with a survey of TRL made before the rewriter existed.

Repairs and `rollout_func` are not about calls of an engine. What each of them looks for is counted here by a regular
expression in the same file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.golden.sources import pinned
from tests.golden.store import UPDATE, exclusive
from tests.golden.survey import EXPECTED, Counts, dumps, record, recorded, survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from trlpatch.preview import Preview

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

REPAIRS = {
    (
        "package_checks",
        "package_check_import",
    ): r"^from transformers\.utils\.import_utils import _is_package_available$",
    ("vllm_tokenizer", "tokenizer_import"): r"^    import vllm\.transformers_utils\.tokenizer$",
    ("vllm_tokenizer", "tokenizer_overwrite"): r"^    vllm\.transformers_utils\.tokenizer\.\w+ = ",
    ("without_requests", "adapter_import"): r"^from requests\.adapters import HTTPAdapter$",
    (
        "weight_sender",
        "sender_import",
    ): r"^    from vllm\.distributed\.weight_transfer\.nccl_engine import NCCLTrainerSendWeightsArgs, ",
    ("guided_decoding", "guided_import"): r"^    from vllm\.sampling_params import GuidedDecodingParams$",
    ("guided_decoding", "guided_field"): r"\bguided_decoding=|\"guided_decoding\"[\]:]",
    ("warnings_issued", "warnings_issued"): r"\bmodel\.warnings_issued\[",
    ("use_cache", "use_cache"): r"\bmodel_init_kwargs\.get\(\"use_cache\"\)",
    ("seed_worker", "worker_init"): r"= seed_worker$",
    ("default_kwargs", "kwargs_update"): r"\.update\(self\.args\.generation_kwargs\)",
    ("trainer_parts", "use_apex"): r"\bself\.use_apex\b",
    ("trainer_parts", "nested_gather"): r"\bself\._nested_gather\(",
    ("tool_engine", "context_length"): r"= self\.llm\.llm_engine\.model_config\.",
    ("gold_length", "completion_length"): r"= generation_config\.max_completion_length$",
    ("plain_prompts", "prepare_messages"): r"\bprepare_multimodal_messages_vllm\(",
    (
        "prompt_limit",
        "truncation_field",
    ): r"\"truncate_prompt_tokens\": self\.max_prompt_length,\n +\"guided_decoding\":",
    ("prompt_limit", "truncated_rollout"): r"\bself\.llm\.(?:generate|chat)\(",
    ("rollout_func", "rollout_func_stored"): r"^        self\.rollout_func = rollout_func$",
    ("rollout_func_server", "rollout_func_stored"): r"^        self\.rollout_func = rollout_func$",
    ("image_prompts", "image_rollout"): r"\bself\.llm\.generate\(",
    ("top_k", "top_k"): r"generation_(?:kwargs|params) = \{\n +\"n\": [^}]*\"top_k\": ",
}
"""Anchor of a repair, or of `rollout_func` -> what it looks for."""


def test_survey_counts_what_is_expected(
    version: str, trl_tree: Callable[[str], Path], expected_anchors: Counts
) -> None:
    assert survey(trl_tree(version) / "trl") == expected_anchors


def test_rewriter_finds_what_is_expected(
    version: str, previewed: Callable[[str], Preview], expected_anchors: Counts
) -> None:
    found: Counts = {}
    for file in previewed(version).files:
        counts: Counter[str] = Counter()
        for outcome in file.rewritten.outcomes:
            for anchor, count in outcome.anchors.items():
                if (outcome.patch, anchor) not in INSERTED | REPAIRS.keys():
                    counts[KINDS[outcome.patch, anchor]] += count
        if +counts:
            found[file.name] = dict(sorted((+counts).items()))
    unknown = sorted(expected_anchors.keys() - {file.name for file in previewed(version).files})
    assert not unknown, (
        f"{', '.join(unknown)} of TRL {version} uses an engine and is no target. A new trainer: give it and its "
        "config an entry in trlpatch/source/targets.py, in the variants of the patches that apply to trainers on "
        "VLLMGeneration, and in the tables of trlpatch/rewrite/census/names.py; one that moved: a location there"
    )
    assert found == expected_anchors


def test_repairs_find_what_a_plain_search_finds(version: str, previewed: Callable[[str], Preview]) -> None:
    for file in previewed(version).files:
        for outcome in file.rewritten.outcomes:
            for anchor, count in outcome.anchors.items():
                pattern = REPAIRS.get((outcome.patch, anchor))
                if pattern is not None:
                    found = re.findall(pattern, file.source.text, re.MULTILINE)
                    assert len(found) == count, (file.name, outcome.patch, anchor)


def test_expected_counts_are_of_pinned_releases(updating: frozenset[str]) -> None:
    with exclusive():
        counts = recorded()
        if updating:
            record(counts, pinned())
        text = EXPECTED.read_text(encoding="utf-8")
    in_order = [version for version in pinned() if version in counts]
    assert list(json.loads(text)) == in_order, f"orphans, or another order than golden/releases.toml; {UPDATE}"
    assert text == dumps({version: counts[version] for version in in_order})


def test_counts_are_written_in_the_order_of_the_releases(tmp_path: Path) -> None:
    counts: dict[str, Counts] = {"2.0.0": {}, "9.9.9": {}, "1.0.0": {"trl/a.py": {"engine": 1}}}
    record(counts, ["1.0.0", "2.0.0", "3.0.0"], tmp_path / "anchors.json")
    written = recorded(tmp_path / "anchors.json")
    assert list(written) == ["1.0.0", "2.0.0"]
    assert written["1.0.0"] == counts["1.0.0"]


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
