"""Census of a patched target and of TRL's other modules: each finding as the outcome of a check, with its place."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from trlpatch.outcomes import ENGINE_USE, Drift, Outcome
from trlpatch.rewrite.census.names import lost_names
from trlpatch.rewrite.census.uses import Use, unknown_uses
from trlpatch.rewrite.census.vocabulary import GENERATION, MENTIONED, OWN_PROCESS
from trlpatch.rewrite.edits import calls
from trlpatch.rewrite.outline import Outline, outline
from trlpatch.rewrite.plan import Plan
from trlpatch.source.locate import SourceFile, TrlInstall
from trlpatch.source.releases import Release
from trlpatch.source.targets import TARGETS

TARGET_ADVICE = "a patch has to learn this form; until then this target and those coupled to it can only stay stock"
NAME_ADVICE = "hooks have to learn the new name; until then this target and those coupled to it can only stay stock"
MODULE_ADVICE = (
    "no patch knows how it syncs, sleeps and rolls out: do not train on an engine with what this module defines; "
    'on_drift="stock" patches the rest and warns'
)
UNTAUGHT_ADVICE = (
    "no patch knows this trainer: its rollouts, sleep and weight sync are VLLMGeneration's, but it does not switch "
    "vLLM on for an engine that the model carries (set use_vllm=True and vllm_mode='colocate'), and takes no "
    "vllm_sampling_params"
)


def in_target(source: SourceFile, release: Release, steps: Plan, upstream: Outline, patched: Outline) -> list[Outcome]:
    """Return which uses of an engine are of no known form in patched text, and which names the target lost."""
    stock = frozenset(skip.patch.name for skip in steps.skips if not skip.forbids)
    target = source.target
    found = [*unknown_uses(patched.parents, stock)] if _mentions("".join(patched.lines)) else []
    found += _left_over(steps, patched)
    lost: list[Use] = []
    if "live_adapter" not in steps.excluded:
        lost += lost_names(target.name, release, target.classes, patched)
    lines = _upstream_lines(upstream.lines, patched.lines) if found or lost else []
    return [
        _outcome(target.name, str(source.path), upstream, Use(lines[use.line - 1], use.what), advice)
        for uses, advice in ((found, TARGET_ADVICE), (lost, NAME_ADVICE))
        for use in dict.fromkeys(uses)
    ]


def in_module(text: str, name: str, path: str = "", release: Release | None = None) -> list[Outcome]:
    """Return what `text`, a file of TRL that is no target, does with an engine in no known form.

    Args:
        name: path inside the distribution, with slashes: `trl/experimental/dppo/dppo_trainer.py`.
        path: where it is on this machine, for the message.
        release: of the modules of `OWN_PROCESS` only those of this one have no findings; None means those of any.
    """
    if not _mentions(text) or _own_process(name, release):
        return []
    try:
        file = outline(text, ())
    except SyntaxError:  # it cannot be imported, so it uses nothing
        return []
    return [_outcome(name, path or name, file, use, MODULE_ADVICE) for use in unknown_uses(file.parents, None)]


def in_modules(install: TrlInstall, shown: Callable[[Path], Path] = Path) -> list[Outcome]:
    """Return what `in_module`, or else `untaught`, finds in each module of this TRL that is no target.

    Args:
        shown: the path that messages name, for a file of a wheel.
    """
    found: list[Outcome] = []
    for path in module_files(install):
        name = f"trl/{path.relative_to(install.root).as_posix()}"
        text, place = path.read_bytes().decode(errors="replace"), str(shown(path))
        found += in_module(text, name, place, install.release) or untaught(text, name, place)
    return found


def untaught(text: str, name: str, path: str = "") -> list[Outcome]:
    """Return one outcome "skipped" if `text`, in which `in_module` finds nothing, builds a `VLLMGeneration`.

    A trainer of no target: what it does with an engine happens in the methods of a class that is patched. The class of
    a target, in another file, is none: it has moved, which is said elsewhere.
    """
    if f"{GENERATION}(" not in text:
        return []
    try:
        file = outline(text, ())
    except SyntaxError:
        return []
    known = {name for target in TARGETS.values() for name in target.classes}
    if any(isinstance(node, ast.ClassDef) and node.name in known for node in file.tree.body):
        return []
    built = [call.lineno for call in file.parents.of(ast.Call) if calls(call, GENERATION)]
    what = f"rolls out through {GENERATION}"
    return [
        _outcome(name, path or name, file, Use(line, what), UNTAUGHT_ADVICE, status="skipped") for line in built[:1]
    ]


def module_files(install: TrlInstall) -> list[Path]:
    """Return the files that `in_modules` reads, sorted."""
    locations = (target.location(install.release) for target in TARGETS.values() if target.kind != "support")
    known = {location.file for location in locations if location is not None}
    files = install.root.rglob("*.py")
    return sorted(path for path in files if path.relative_to(install.root).as_posix() not in known)


def _own_process(name: str, release: Release | None) -> bool:
    return any(name == f"trl/{one.module}" and (release is None or release in one.trl) for one in OWN_PROCESS)


def _mentions(text: str) -> bool:
    return MENTIONED.search(text) is not None


def _left_over(steps: Plan, patched: Outline) -> Iterator[Use]:
    """Yield the anchors that patches left as they were, because they stand where patches do not look."""
    for step in steps.steps:
        for anchor in step.patch.signs:
            for node in patched.matching(anchor.sign):
                yield Use(node.lineno, f"{step.patch.name} does not reach this {anchor.name.replace('_', ' ')}")


def _outcome(
    target: str, path: str, file: Outline, use: Use, advice: str, status: Literal["failed", "skipped"] = "failed"
) -> Outcome:
    qualname, _ = file.scope(use.line)
    line = f"{use.line}: {file.lines[use.line - 1].strip()}" if file.lines else ""
    drift = Drift(path, use.line, qualname or "module", ENGINE_USE, 0, 1, line)
    return Outcome(target, ENGINE_USE, status, f"{use.what}; {advice}", drift=drift)


def _upstream_lines(upstream: Sequence[str], patched: Sequence[str]) -> list[int]:
    """Return, for every line of the patched text, the line of upstream's that it stands for."""
    lines: list[int] = []
    for _, low, high, start, end in difflib.SequenceMatcher(None, upstream, patched, autojunk=False).get_opcodes():
        lines += [min(low + offset, max(high - 1, low)) + 1 for offset in range(end - start)]
    return [min(line, len(upstream)) for line in lines]
