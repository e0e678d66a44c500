"""TRL's files that are no targets: they may hold an engine by no known form but the harmless ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from trlpatch.outcomes import ENGINE_USE
from trlpatch.rewrite.census.findings import in_module, in_modules, module_files, untaught
from trlpatch.rewrite.census.uses import unknown_uses
from trlpatch.rewrite.census.vocabulary import (
    CONSTRUCTORS,
    ENGINE_ONLY,
    ENGINES,
    HOLDER,
    MENTIONED,
    MERGES,
    OWN_PROCESS,
)
from trlpatch.rewrite.tree import Tree
from trlpatch.source.locate import TrlInstall, find_trl

TRAINER = """\
from ...trainer.grpo_trainer import GRPOTrainer


class NewPOTrainer(GRPOTrainer):
    def _generate_single_turn(self, prompts, executor):
        {}
"""

REFUSED = [
    "return self.vllm_generation.llm.generate(prompts)",
    "return self.llm.chat(prompts)",
    "engine = self.vllm_generation.llm",
    "generation = self.vllm_generation",
    "return sample(self.vllm_generation, prompts)",
    "return getattr(self, 'vllm_generation').llm.generate(prompts)",
    "return getattr(self.vllm_generation, name).generate(prompts)",
    "self.vllm_generation._push_all()",
    "self.vllm_generation.push_all()",
    "push = self.vllm_generation._push_all",
    "self.vllm_generation.sync_weights = self.sync",
    "self.vllm_generation.llm = self.build()",
    "self._sync_fsdp1_params_to_vllm(self.model)",
    "self._move_model_to_vllm_inner()",
    "self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights([])",
    "self.model.merge_adapter()\n        self.vllm_generation.sync_weights()",
    "self.engine = LLM('m')",
    "from vllm import LLM as Engine",
    "from vllm.entrypoints.llm import (\n            LLM as Engine,\n        )",
    "llm = self.engine\n        return llm.generate(prompts)",
]

HARMLESS = [
    "return self.vllm_generation.generate(prompts)",
    "self.vllm_generation.sync_weights()",
    "sync = self.vllm_generation.sync_weights",
    "self._move_model_to_vllm()",
    "self.vllm_generation = VLLMGeneration(model=self.model)",
    "self.vllm_generation = None",
    "self.vllm_generation.logprobs = 3",
    "group = self.vllm_generation.tp_group",
    "self.vllm_generation.vllm_client.reset_prefix_cache()",
    "ready = self.vllm_generation is not None and hasattr(self, 'vllm_generation')",
    "length = self.vllm_generation.llm.llm_engine.model_config.max_model_len",
    "words = self.vllm_generation.llm.get_tokenizer()",
    "from vllm import LLM, SamplingParams",
    "self.model.merge_adapter()\n        self.push_to_server()",
    "return self.llm_judge.generate(prompts)",
    "return self.vllm_client.generate(prompts)",
]


@pytest.mark.parametrize("body", REFUSED)
def test_a_trainer_that_uses_an_engine_past_the_patched_methods_is_found(body: str):
    text = TRAINER.format(body)
    (first, *_) = in_module(text, "trl/experimental/newpo/newpo_trainer.py", "/site/newpo_trainer.py")
    assert (first.target, first.patch) == ("trl/experimental/newpo/newpo_trainer.py", ENGINE_USE)
    assert "do not train on an engine with what this module defines" in first.reason
    assert first.drift is not None
    assert first.drift.file == "/site/newpo_trainer.py"
    number, _, line = first.drift.lookalike.partition(": ")
    assert text.splitlines()[int(number) - 1].strip() == line


@pytest.mark.parametrize("body", HARMLESS)
def test_a_trainer_that_keeps_to_the_patched_methods_is_no_alarm(body: str):
    assert in_module(TRAINER.format(body), "trl/experimental/newpo/newpo_trainer.py") == []


@pytest.mark.parametrize("body", [*HARMLESS, *REFUSED])
def test_a_trainer_that_builds_a_vllm_generation_is_none_that_nobody_mentions(body: str):
    found = untaught(TRAINER.format(body), "trl/experimental/newpo/newpo_trainer.py", "/site/newpo_trainer.py")
    assert [outcome.status for outcome in found] == ["skipped"] * ("VLLMGeneration(" in body)
    assert all("set use_vllm=True" in outcome.reason for outcome in found)


@pytest.mark.parametrize(
    "text",
    [
        "VLLMGeneration(",
        "# VLLMGeneration(...)\n",
        "def build_VLLMGeneration(a): ...\n",
        "class GRPOTrainer:\n    x = VLLMGeneration(1)\n",
    ],
)
def test_what_builds_no_vllm_generation_or_has_moved_is_not_mentioned(text: str):
    assert untaught(text, "trl/a.py") == []


@pytest.mark.parametrize("body", REFUSED)
def test_no_file_with_a_finding_is_passed_over_before_it_is_parsed(body: str):
    assert MENTIONED.search(TRAINER.format(body))


@pytest.mark.parametrize("name", sorted({*ENGINES, HOLDER, *CONSTRUCTORS, *ENGINE_ONLY, *MERGES, "_push_to_vllm"}))
@pytest.mark.parametrize("form", ["a.{}", "{}", "f('{}')", "f('a.{}.b')", "from x import (\n{} as y)", "[{}]"])
def test_every_word_of_the_census_is_seen_in_text(name: str, form: str):
    assert MENTIONED.search(form.format(name))


@pytest.mark.parametrize(
    "line",
    ["from vllm import *", "from vllm.entrypoints.llm import *", "from  vllm  import  *", "from vllm import(*)"],
)
def test_a_star_import_of_vllm_is_seen_in_text(line: str):
    assert MENTIONED.search(line)


def test_a_star_import_of_vllm_is_found():
    assert in_module("from vllm import *\n", "trl/a.py")


def test_a_file_that_is_not_python_uses_nothing():
    assert in_module("llm = (", "trl/a.py") == []


@pytest.fixture
def trl(tmp_path: Path) -> TrlInstall:
    """A TRL 1.16.0 with a target, a server script and two modules that nobody knows, of which one uses an engine."""
    use = "def roll(self):\n    return self.vllm_generation.llm.generate('a')\n"
    for file, text in {
        "trl/__init__.py": "",
        "trl/trainer/grpo_trainer.py": use,
        "trl/scripts/vllm_serve.py": "llm = LLM('m')\nllm.generate('a')\n",
        "trl/experimental/newpo/newpo_trainer.py": use,
        "trl/experimental/newpo/latin.py": "# \xe9\nuse_vllm = True\n",
        "trl-1.16.0.dist-info/METADATA": "",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))
    return find_trl(tmp_path)


def test_only_unknown_modules_are_counted(trl: TrlInstall):
    assert [outcome.target for outcome in in_modules(trl)] == ["trl/experimental/newpo/newpo_trainer.py"]
    names = [path.relative_to(trl.root).as_posix() for path in module_files(trl)]
    of_newpo = ["experimental/newpo/latin.py", "experimental/newpo/newpo_trainer.py"]
    assert names == ["__init__.py", *of_newpo, "scripts/vllm_serve.py"]


def test_a_module_is_set_apart_in_its_releases_only():
    use, name = "llm = LLM('m')\n", "trl/experimental/ssd/ssd_eval.py"
    assert in_module(use, name) == in_module(use, name, release=(1, 6, 0)) == []
    assert in_module(use, name, release=(1, 7, 0))


def test_every_module_set_apart_says_why():
    assert all(entry.reason and entry.module.endswith(".py") for entry in OWN_PROCESS)


def test_a_target_is_judged_as_one_and_other_files_are_not():
    text = "trainer._trlpatch = 1\nself.llm = LLM('m')\n"
    assert unknown_uses(Tree(ast.parse(text)), None)
    assert unknown_uses(Tree(ast.parse(text)), frozenset({"engine_reuse"})) == []


def test_nothing_of_the_census_is_imported_on_a_warm_start():
    code = "import sys, trlpatch.runtime.session; print(any('rewrite' in name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
