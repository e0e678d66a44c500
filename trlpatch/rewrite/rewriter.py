"""Rewriter: apply a plan to a source file. Outline, edit the statements that hold anchors, insert, splice, check."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from trlpatch.outcomes import OUTPUT_CHECK, WHOLE_FILE, Drift, Outcome
from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.census.findings import in_target
from trlpatch.rewrite.checks import problems
from trlpatch.rewrite.edits import HOOKS, MARKER
from trlpatch.rewrite.outline import Function, Outline, Region, outline
from trlpatch.rewrite.plan import Plan, Skip, Step, plan
from trlpatch.source.locate import SourceFile
from trlpatch.source.releases import Release

_IMPORT = f"{MARKER}hooks\nimport trlpatch.hooks as {HOOKS}\n\n"


@dataclass(frozen=True)
class Rewritten:
    """A source file with its plan applied; the upstream text if anything failed.

    Attributes:
        touched: qualified names of the functions and field lists that differ from upstream.
        rejected: the patched text, if it failed an output check; empty otherwise.
    """

    source: SourceFile
    text: str
    outcomes: tuple[Outcome, ...]
    touched: tuple[str, ...]
    rejected: str = ""

    @property
    def sha256(self) -> str:
        """Hex digest of the text as UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The outcomes that make this target, and those it coupled_with to, stay stock."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")


def rewrite(
    source: SourceFile,
    release: Release,
    *,
    skip: frozenset[str] = frozenset(),
    asked_for: frozenset[str] = frozenset(),
) -> Rewritten:
    """Return `source` with every patch that applies to it in `release`, of the optional ones those in `asked_for`.

    Never raises for drift, a use of an engine that no patch knows, a failed check or what is not Python: the outcome
    says so and the text is upstream's.

    Raises:
        UnknownPatch: `skip` names a patch that does not exist.
    """
    steps = plan(source.target, release, skip, asked_for)
    try:
        result, upstream, patched = _apply(source, steps)
    except SyntaxError as error:
        reason = f"{source.path}:{error.lineno} is not Python: {error.msg}. Run: pip install --force-reinstall trl"
        return Rewritten(source, source.text, (Outcome(source.target.name, WHOLE_FILE, "failed", reason),), ())
    unknown = [] if result.failed else in_target(source, release, steps, upstream, patched)
    return Rewritten(source, source.text, (*result.outcomes, *unknown), ()) if unknown else result


def apply_plan(source: SourceFile, steps: Plan) -> Rewritten:
    """Return `source` with `steps` applied, or its own text if one of them failed; without the census of `rewrite`.

    Raises:
        SyntaxError: `source` is not Python.
    """
    return _apply(source, steps)[0]


def _apply(source: SourceFile, steps: Plan) -> tuple[Rewritten, Outline, Outline]:
    """Return the result, and the outlines of upstream's text and of the result's."""
    upstream = outline(source.text, source.target.classes)
    edits = _Edits(upstream, steps)
    outcomes = [_applied(source, upstream, edits, step) for step in steps.steps]
    outcomes += [_skipped(source, upstream, skip) for skip in steps.skips]
    absent = (_skipped(source, upstream, skip) for skip in steps.absent)
    outcomes += [outcome for outcome in absent if outcome.status == "failed"]
    if any(outcome.status == "failed" for outcome in outcomes):
        return Rewritten(source, source.text, tuple(outcomes), ()), upstream, upstream
    text = edits.splice()
    patched, found = _checked(source, upstream, edits, text)
    if found:
        outcomes += [_failed_check(source, problem) for problem in found]
        return Rewritten(source, source.text, tuple(outcomes), (), rejected=text), upstream, upstream
    return Rewritten(source, text, tuple(outcomes), edits.touched), upstream, patched


class _Edits:
    """What one plan does to one file, by line."""

    def __init__(self, file: Outline, steps: Plan) -> None:
        self.file = file
        self.plan = steps
        self.found: dict[str, Counter[Anchor]] = {step.patch.name: Counter() for step in steps.steps}
        self.places: dict[tuple[str, Anchor], int] = {}
        self._touched: dict[str, None] = {}
        self._replaced: dict[Region, str] = {}
        self._inserted: defaultdict[int, list[str]] = defaultdict(list)
        for step in steps.steps:
            self._insert(step)
        self._transform([step for step in steps.steps if step.patch.transformer is not None])

    @property
    def touched(self) -> tuple[str, ...]:
        return tuple(self._touched)

    @property
    def hits(self) -> int:
        return sum(counter.total() for counter in self.found.values())

    def splice(self) -> str:
        """Return the file with everything put in."""
        if not self.hits:
            return "".join(self.file.lines)
        inserted = self._inserted | {self.file.import_line: [_IMPORT, *self._inserted[self.file.import_line]]}
        parts: list[str] = []
        position = 1
        cuts = {region.first: region for region in self._replaced}
        for line in sorted({*cuts, *inserted}):
            parts += [self.file.text(position, line - 1), *inserted.get(line, [])]
            position = line
            if line in cuts:
                parts.append(self._replaced[cuts[line]])
                position = cuts[line].last + 1
        return "".join([*parts, *self.file.lines[position - 1 :]])

    def _count(self, step: Step, anchor: Anchor, function: str, line: int, count: int = 1) -> None:
        self.found[step.patch.name][anchor] += count
        self.places.setdefault((step.patch.name, anchor), line)
        self._touched[function] = None

    def _insert(self, step: Step) -> None:
        if step.patch.inserter is None:
            return
        for insertion in step.patch.inserter(self.file, step.variant.anchors):
            lines = [MARKER + step.patch.name, *insertion.statements.splitlines()]
            text = "".join(f"{insertion.indent}{line}\n" for line in lines)
            self._inserted[insertion.line].append(text)
            self._count(step, insertion.anchor, insertion.function, insertion.line)

    def _transform(self, steps: list[Step]) -> None:
        inside = [(step, _prefilter(step, at_module_level=False)) for step in steps]
        for function in self.file.functions:
            self._search(function, inside)
        self._search(self.file.module, [(step, _prefilter(step, at_module_level=True)) for step in steps])

    def _search(self, function: Function, wanted: list[tuple[Step, frozenset[str]]]) -> None:
        every = frozenset(text for _, prefilter in wanted for text in prefilter)
        for region in self.file.regions(function, lambda lines: any(text in lines for text in every)):
            self._edit(region, [step for step, prefilter in wanted if any(t in region.text for t in prefilter)])

    def _edit(self, region: Region, steps: list[Step]) -> None:
        module = region.parse()
        markers = []
        for step in steps:
            assert step.patch.transformer is not None
            transformer = step.patch.transformer(region)
            module = module.visit(transformer)
            for anchor, count in transformer.hits.items():
                self._count(step, anchor, region.function, region.first, count)
            if transformer.hits:
                markers.append(f"{self.file.indent(region.first)}{MARKER}{step.patch.name}\n")
        if markers:
            self._replaced[region] = "".join(markers) + region.unparse(module)


def _prefilter(step: Step, *, at_module_level: bool) -> frozenset[str]:
    anchors = {anchor for variant in step.patch.variants for anchor in variant.anchors}
    return frozenset(t for anchor in anchors if anchor.at_module_level == at_module_level for t in anchor.prefilter)


def _applied(source: SourceFile, file: Outline, edits: _Edits, step: Step) -> Outcome:
    target, patch, variant = source.target.name, step.patch.name, str(step.variant.trl)
    found, expected = edits.found[patch], step.variant.anchors
    counts = {anchor.name: found[anchor] for anchor in [*expected, *(a for a in found if a not in expected)]}
    # What should not be there says more than what is therefore missing.
    for anchor in [*(anchor for anchor in found if anchor not in expected), *expected]:
        if found[anchor] != expected.get(anchor, 0):
            place = edits.places.get((patch, anchor), 0)
            drift = _drift(source, file, anchor, expected.get(anchor, 0), found[anchor], place)
            reason = f"{anchor.name}: expected {drift.expected}, found {drift.found}"
            return Outcome(target, patch, "failed", reason, variant, counts, drift)
    return Outcome(target, patch, "applied", "", variant, counts)


def _skipped(source: SourceFile, file: Outline, skip: Skip) -> Outcome:
    target, patch = source.target.name, skip.patch.name
    for anchor in skip.patch.signs if skip.forbids else ():
        node = next(file.matching(anchor.sign), None)
        if node is not None:
            reason = f"{anchor.name}: expected 0, because {skip.reason}, found one"
            return Outcome(target, patch, "failed", reason, drift=_drift(source, file, anchor, 0, 1, node.lineno))
    return Outcome(target, patch, "skipped", skip.reason)


def _lines_like(file: Outline, pattern: str) -> list[int]:
    search = re.compile(pattern).search
    code = ((n, line) for n, line in enumerate(file.lines, 1) if n not in file.prose)
    return [n for n, line in code if search(line) and not line.lstrip().startswith("#")]


def _drift(source: SourceFile, file: Outline, anchor: Anchor, expected: int, found: int, line: int) -> Drift:
    alike = _lines_like(file, anchor.hint)
    nearest = min(alike, key=lambda candidate: abs(candidate - line), default=0) if line else next(iter(alike), 0)
    around = line or nearest
    function = next((f for f in file.functions if f.first <= around <= f.last), None)
    qualname, first = (function.qualname, function.first) if function else file.scope(line) if line else ("", 0)
    return Drift(
        file=str(source.path),
        line=first or max(around, 1),
        qualname=qualname or ", ".join(source.target.classes) or "module",
        anchor=anchor.name,
        expected=expected,
        found=found,
        lookalike=f"{nearest}: {file.lines[nearest - 1].strip()}" if nearest else "",
    )


def _checked(source: SourceFile, upstream: Outline, edits: _Edits, text: str) -> tuple[Outline, list[str]]:
    """Return the outline of the patched text, and what is wrong with it."""
    if not edits.hits:
        return upstream, []
    try:
        patched = outline(text, source.target.classes)
    except SyntaxError as error:
        return upstream, [f"does not parse: {error}"]
    second = _Edits(patched, edits.plan)
    again = [f"{name} is not idempotent" for name, counter in second.found.items() if counter]
    return patched, [*again, *problems(upstream, patched, frozenset(edits.touched))]


def _failed_check(source: SourceFile, problem: str) -> Outcome:
    drift = Drift(str(source.path), 1, ", ".join(source.target.classes), OUTPUT_CHECK, 0, 1, "")
    return Outcome(source.target.name, OUTPUT_CHECK, "failed", problem, drift=drift)
