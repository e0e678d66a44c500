"""Fit: whether the patches fit a TRL, what stays stock and why. One answer, for PatchFastRL and the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trlpatch.outcomes import Outcome
from trlpatch.source.coupling import stock_targets
from trlpatch.source.locate import SourceFile, TrlInstall, missing
from trlpatch.source.releases import NEWEST_TESTED, format_release

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trlpatch.source.absent import Absence


class Fit(NamedTuple):
    """How the patches fit the targets that were asked for.

    Attributes:
        present: the targets whose file is there.
        absences: the targets whose file is not there.
        failures: the patches that do not fit, and the absences that may not be passed over.
        modules: uses of an engine that no patch knows, in files that are no targets. They hold no target back.
        untaught: trainers of no target that roll out through `VLLMGeneration`, which is one.
        moved: where the classes are that a target with a failure should define and does not.
    """

    install: TrlInstall
    present: frozenset[str]
    absences: Sequence[Absence]
    failures: tuple[Outcome, ...]
    moved: Mapping[str, str]
    modules: tuple[Outcome, ...] = ()
    untaught: tuple[Outcome, ...] = ()

    @property
    def untested(self) -> bool:
        """Whether this release is newer than the newest one in golden/releases.toml."""
        return self.install.release > NEWEST_TESTED

    @property
    def refused(self) -> tuple[Outcome, ...]:
        """Everything for which `PatchFastRL()` raises: the failures, and what is wrong with other modules."""
        return (*self.failures, *self.modules)

    @property
    def gone(self) -> dict[str, str]:
        """Targets that this TRL does not have any more, and why they are no failure."""
        return {one.target.name: one.reason for one in self.absences if not one.failed}

    @property
    def failed(self) -> frozenset[str]:
        """Targets with a failure."""
        return frozenset(failure.target for failure in self.failures)

    @property
    def stock(self) -> frozenset[str]:
        """Targets that stay stock: those with a failure, and those that share an engine with one of them."""
        return stock_targets(self.failed, sorted(self.present)) if self.failed else frozenset()

    @property
    def held_back(self) -> frozenset[str]:
        """Targets that fit but stay stock, because one that they share an engine with does not fit."""
        return self.stock - self.failed

    @property
    def verdict(self) -> str:
        """Say in one sentence whether all fits, what does not, and what is not there."""
        if self.failed:
            parts = [f"patches do not fit: {_listed(self.failed)}"]
            if self.held_back:
                parts.append(f"{HELD_BACK}: {_listed(self.held_back)}")
        else:
            parts = ["every patch fits" + (" what is there" if self.gone else "")]
        if self.modules:
            parts.append(f"{UNKNOWN_USE} {_listed({one.target for one in self.modules})}")
        if self.untaught:
            parts.append(f"{self.through_generation}: {_listed({one.target for one in self.untaught})}")
        if self.gone:
            parts.append(f"not in this TRL: {_listed(self.gone)}")
        return "; ".join(parts)

    @property
    def through_generation(self) -> str:
        """Say what becomes of the rollouts of a trainer in `untaught`."""
        patched = "vllm_generation" in self.present - self.stock
        return f"no target, rolls out through VLLMGeneration, which {'is patched' if patched else 'stays stock'}"

    @property
    def untested_line(self) -> str:
        """Say what an untested release is, and how the patches fit it; empty for one that was tested."""
        newest = format_release(NEWEST_TESTED)
        about = f"untested release: TRL {self.install.version} is newer than {newest}, decided by its anchors"
        return f"{about}; {self.verdict}" if self.untested else ""


UNKNOWN_USE = "an engine is used as no patch knows in"
HELD_BACK = "stays stock, shares an engine with a target that does not fit"


def judge_fit(
    install: TrlInstall,
    found: Sequence[SourceFile],
    wanted: frozenset[str],
    failed: Iterable[Outcome],
    modules: Iterable[Outcome] = (),
) -> Fit:
    """Judge how the targets `wanted` fit.

    Args:
        found: those whose file is there.
        failed: the patches that do not fit their text.
        modules: what the census found in files that are no targets; "skipped" where it is no failure.
    """
    absent: tuple[Absence, ...] = ()
    if any(target.name in wanted for target, _ in missing(install)):
        # Only here: a release that has all of its files is not searched.
        from trlpatch.source.absent import absences

        absent = absences(install, wanted)
    unfit = tuple(failed)
    failures = (*unfit, *(one.outcome for one in absent if one.failed))
    present, moved = frozenset(one.target.name for one in found), _moved(install, found, unfit)
    found_there = tuple(modules)
    unknown = tuple(one for one in found_there if one.status == "failed")
    # A later call for other targets knows nothing of what an earlier one did to VLLMGeneration.
    untaught = tuple(one for one in found_there if one.status == "skipped" and "vllm_generation" in wanted)
    return Fit(install, present, absent, failures, moved, unknown, untaught)


def _moved(install: TrlInstall, found: Sequence[SourceFile], unfit: Sequence[Outcome]) -> dict[str, str]:
    drifted = {failure.target for failure in unfit if failure.drift is not None}
    if not drifted:
        return {}
    from trlpatch.source.absent import moved_classes

    said = {one.target.name: moved_classes(install, one.target) for one in found if one.target.name in drifted}
    return {name: text for name, text in said.items() if text}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
