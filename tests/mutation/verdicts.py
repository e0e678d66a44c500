"""The verdict on a mutant: what trlpatch makes of it, judged by the two oracles."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.mutation import config_oracle, engine_reading, executed, hosts
from tests.mutation.mutants import Mutant
from trlpatch.preview import preview
from trlpatch.rewrite.census.findings import in_module
from trlpatch.rewrite.census.vocabulary import OWN_PROCESS
from trlpatch.rewrite.rewriter import rewrite
from trlpatch.source.locate import SourceFile, TrlInstall, find_trl, sources

VERDICTS = ("killed", "routed", "silent", "false alarm", "unproven", "invalid")


@dataclass(frozen=True)
class Judged:
    """A mutant with its verdict and the reasons for it."""

    mutant: Mutant
    verdict: str
    reasons: tuple[str, ...] = ()


def judge(mutant: Mutant) -> Judged:
    """Return what became of a mutant.

    killed: trlpatch refuses it. routed: applied, and both oracles find it right. silent: applied, and one finds it
    wrong. false alarm: harmless and refused. unproven: applied, and a hook was not reached. invalid: not Python.
    """
    try:
        for text in mutant.files.values():
            hosts.parsed(text or "")
        refusals, patched = attempt(mutant)
        for text in mutant.files.values() if mutant.harmless and refusals else ():
            compile(text or "", "<mutant>", "exec", dont_inherit=True)
    except SyntaxError as error:
        return Judged(mutant, "invalid", (str(error),))
    if refusals:
        return Judged(mutant, "false alarm" if mutant.harmless else "killed", tuple(refusals))
    wrong: list[str] = []
    unreached: list[str] = []
    for path, text in patched.items():
        before = mutant.files.get(path) or ""
        if path.endswith("_config.py"):
            wrong += config_oracle.judge(text)
            continue
        wrong += engine_reading.judge(text, *(other for name, other in patched.items() if name != path))
        try:
            ran = executed.judge(text, before, _upstream(mutant.release, path))
        except SyntaxError as error:
            return Judged(mutant, "invalid", (str(error),))
        wrong += ran.wrong
        unreached += ran.unreached
    wrong += config_oracle.across(mutant.release, mutant.files)
    if wrong:
        return Judged(mutant, "silent", tuple(wrong))
    return Judged(mutant, "unproven" if unreached else "routed", tuple(unreached))


def attempt(mutant: Mutant) -> tuple[list[str], dict[str, str]]:
    """Return why trlpatch refuses the tree, or the text that would run of each touched file.

    What `trlpatch check` does with a directory, without its files that are as upstream's. Where a file is gone,
    trlpatch looks for its class everywhere, so the whole tree is laid out.
    """
    if None in mutant.files.values():
        return _whole_tree(mutant)
    install, targets = _release(mutant.release)
    own_process = {entry.module for entry in OWN_PROCESS if install.release in entry.trl}
    refusals: list[str] = []
    patched: dict[str, str] = {}
    for path, text in mutant.files.items():
        source = targets.get(path)
        assert text is not None
        if source is None:
            # As `in_modules` does with every file of the directory.
            if path.removeprefix("trl/") not in own_process:
                refusals += [f"{found.patch}: {found.reason}" for found in in_module(text, path)]
                patched[path] = text
            continue
        rewritten = rewrite(SourceFile(source.target, source.path, source.module, text), install.release)
        refusals += [f"{outcome.patch}: {outcome.reason}" for outcome in rewritten.failed]
        patched[path] = rewritten.text
    return refusals, patched


def _whole_tree(mutant: Mutant) -> tuple[list[str], dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        tree = Path(scratch) / "tree"
        lay_out(mutant, tree)
        found = preview(tree)
    patched = {path: text for path, text in mutant.files.items() if text is not None}
    patched |= {file.name: file.rewritten.text for file in found.files if file.name in patched}
    return [f"{outcome.patch}: {outcome.reason}" for outcome in found.failures], patched


def lay_out(mutant: Mutant, tree: Path) -> None:
    """Write the mutant's whole TRL to the directory `tree`."""
    shutil.copytree(
        hosts.tree_of(mutant.release), tree, ignore=shutil.ignore_patterns("__pycache__", "*.md", "*.jinja")
    )
    for path, text in mutant.files.items():
        (tree / path).unlink(missing_ok=True)
        if text is not None:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text, encoding="utf-8")


@cache
def _release(release: str) -> tuple[TrlInstall, dict[str, SourceFile]]:
    install = find_trl(hosts.tree_of(release))
    return install, {source.name: source for source in sources(install)}


def _upstream(release: str, path: str) -> str:
    try:
        return hosts.read(release, path)
    except FileNotFoundError:
        return ""
