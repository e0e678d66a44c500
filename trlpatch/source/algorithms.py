"""Algorithms: which of the trainers that the target table knows a TRL really has."""

from __future__ import annotations

from collections.abc import Iterator

from trlpatch.errors import UnknownAlgorithm
from trlpatch.source.locate import TrlInstall, spelled
from trlpatch.source.releases import NEWEST_TESTED
from trlpatch.source.targets import ALGORITHMS, INHERITING, TARGETS


def algorithms_in(install: TrlInstall) -> list[str]:
    """Return the algorithms whose trainer is there, by its file."""
    return sorted(name for name in ALGORITHMS if _is_in(install, name))


def require_algorithm(install: TrlInstall, algorithm: str) -> None:
    """Check that the trainer of `algorithm` is in this TRL, where the target table has it.

    Raises:
        UnknownAlgorithm: the name is not in the table, or its trainer has no in-process engine in this release, is
            gone from it, or has moved.
    """
    name = spelled(algorithm)
    if _is_in(install, name):
        return
    reasons = list(_reasons(install, name))
    if not reasons and name in INHERITING:
        return
    raise UnknownAlgorithm(
        f"{algorithm!r} has no trainer with an in-process vLLM engine in TRL {install.version} at {install.root}"
        f"{''.join(f': {reason}' for reason in reasons)}. "
        f"This release has: {', '.join(algorithms_in(install)) or 'none of those that are known'}."
        + (" A later trlpatch may know where it is: pip install -U trlpatch" if reasons and _is_newer(install) else "")
    )


def _is_newer(install: TrlInstall) -> bool:
    return install.release > NEWEST_TESTED


def _trainers(name: str) -> list[str]:
    return [target for target in ALGORITHMS[name] if TARGETS[target].kind == "trainer"]


def _is_in(install: TrlInstall, name: str) -> bool:
    """Tell whether the file of a trainer is there, and for one that inherits from another also its own."""
    locations = (TARGETS[target].location(install.release) for target in _trainers(name))
    files = [location.file for location in locations if location is not None]
    if not any((install.root / file).is_file() for file in files):
        return False
    module, _ = INHERITING.get(name, ("", ""))
    return not module or (install.root / f"{module.replace('.', '/')}.py").is_file()


def _reasons(install: TrlInstall, name: str) -> Iterator[str]:
    """Yield why a trainer is not there; nothing for one that needs no patch and is there in another file."""
    # Only here: a release that has what is asked for is not searched.
    from trlpatch.source.absent import absences
    from trlpatch.source.search import class_files

    absent = absences(install, _trainers(name))
    yield from (absence.reason for absence in absent)
    module, trainer = INHERITING.get(name, ("", ""))
    if absent or not module:
        return
    if not trainer:
        yield f"its file trl/{module.replace('.', '/')}.py is not there"
    elif not class_files(install.root, [trainer]):
        yield f"no file of it defines {trainer}"
