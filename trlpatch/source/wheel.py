"""TRL in a wheel: unpacked for as long as it is read; whatever is said of it names the place inside the wheel."""

from __future__ import annotations

import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trlpatch.errors import TrlNotFound, TrlpatchError

# What zipfile raises for damaged, encrypted and foreign archives; NotImplementedError is a RuntimeError.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class OpenedTrl:
    """A TRL that can be read.

    Attributes:
        directory: what to give to `find_trl`; None for the installed TRL.
        wheel: where the directory was unpacked from, if it was.
    """

    directory: Path | None
    wheel: Path | None = None

    def shown(self, path: Path) -> Path:
        """Return `path` as people find it again: `trl-1.16.0-py3-none-any.whl!/trl/trainer/grpo_trainer.py`."""
        return Path(self.renamed(str(path)))

    def renamed(self, text: str) -> str:
        """Return `text` with the same change wherever it names the unpacked directory."""
        return text if self.wheel is None else text.replace(str(self.directory), f"{self.wheel}!")


@contextmanager
def opened(trl_path: Path | None) -> Iterator[OpenedTrl]:
    """Open a directory that holds a TRL, a wheel, or for None the installed TRL.

    Errors that are raised inside the context name places in the wheel, too.

    Raises:
        TrlNotFound: there is no such file or directory, or it is not a wheel.
    """
    try:
        directory, file = trl_path is None or trl_path.is_dir(), trl_path is not None and trl_path.is_file()
        there = trl_path is None or trl_path.exists()
    except OSError as error:  # a name that is too long, a directory that may not be entered
        raise TrlNotFound(f"Cannot look at {trl_path}: {error.strerror or error}.") from error
    if directory:
        yield OpenedTrl(trl_path)
        return
    assert trl_path is not None
    if not there:
        raise TrlNotFound(f"No such file or directory: {trl_path}. Expected a TRL wheel or a directory holding `trl`.")
    if not file:
        raise _not_a_wheel(trl_path, "not a regular file")
    with tempfile.TemporaryDirectory(prefix="trlpatch-") as scratch:
        trl = OpenedTrl(Path(scratch), trl_path)
        try:
            with zipfile.ZipFile(trl_path) as wheel:
                wanted = [name for name in wheel.namelist() if name.endswith((".py", "METADATA"))]
                wheel.extractall(scratch, wanted)
        except _UNREADABLE as error:
            raise _not_a_wheel(trl_path, trl.renamed(str(error)) or type(error).__name__) from error
        try:
            yield trl
        except TrlpatchError as error:
            error.args = tuple(trl.renamed(arg) if isinstance(arg, str) else arg for arg in error.args)
            raise


def _not_a_wheel(path: Path, reason: str) -> TrlNotFound:
    return TrlNotFound(
        f"{path} is neither a directory nor a wheel ({reason}). Get one with: pip download trl==1.16.0 --no-deps"
    )
