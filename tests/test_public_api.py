from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import trlpatch
from trlpatch import errors
from trlpatch.elsewhere import INSTEAD

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300, cwd=ROOT
    )
    return done.stdout


def test_public_names():
    assert trlpatch.__all__ == [
        "FastLanguageModel",
        "FastModel",
        "FastVisionModel",
        "PatchFastRL",
        "PatchReport",
        "__version__",
        "attach_engine",
        "child_environment",
        "detach_engine",
        "errors",
        "is_bf16_supported",
        "is_bfloat16_supported",
        "lora_request",
        "patch",
        "status",
        "unpatch",
        "vLLMSamplingParams",
    ]


@pytest.mark.parametrize("name", trlpatch.__all__)
def test_every_public_name_resolves(name):
    assert getattr(trlpatch, name) is getattr(trlpatch, name)
    assert name in dir(trlpatch)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = trlpatch.nonsense


@pytest.mark.parametrize("name", INSTEAD)
def test_a_name_of_unsloth_that_is_not_here_says_what_to_do_without(name):
    with pytest.raises(errors.NotOfTrlpatch, match=f"importing {name} from trlpatch: ") as caught:
        exec(f"from trlpatch import {name}", {})
    assert isinstance(caught.value, ImportError)
    with pytest.raises(errors.NotOfTrlpatch, match=f"importing {name} from trlpatch: "):
        exec(f"from trlpatch import PatchFastRL, {name} as mine", {})


@pytest.mark.parametrize("name", INSTEAD)
def test_a_name_of_unsloth_that_is_not_here_is_no_attribute(name):
    assert not hasattr(trlpatch, name)
    assert getattr(trlpatch, name, None) is None
    with pytest.raises(
        AttributeError, match=rf"module 'trlpatch' has no attribute '{name}': {name} of Unsloth "
    ) as caught:
        getattr(trlpatch, name)
    assert isinstance(caught.value, errors.NoSuchAttribute)


def test_a_name_that_nobody_has_cannot_be_imported():
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'trlpatch'"):
        exec("from trlpatch import nonsense", {})


def test_plain_names_are_the_same_functions():
    from trlpatch.runtime import session

    assert trlpatch.patch is trlpatch.PatchFastRL is session.PatchFastRL
    assert trlpatch.unpatch is session.revert
    assert trlpatch.status is session.status


def test_version_without_metadata(monkeypatch):
    import importlib.metadata

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert isinstance(trlpatch.__version__, str)
    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert trlpatch._version() == "0+unknown"


def test_importing_imports_nothing_else():
    shown = python("import sys; before = set(sys.modules); import trlpatch; print(*sorted(set(sys.modules) - before))")
    assert set(shown.split()) <= {"__future__", "trlpatch", "trlpatch.errors"}


def test_the_names_import_nothing_heavy():
    shown = python(
        "import sys, trlpatch\n"
        "[getattr(trlpatch, name) for name in trlpatch.__all__]\n"
        "print(*({'libcst', 'torch', 'trl', 'vllm', 'transformers', 'peft', 'click', 'rich'} & set(sys.modules)))"
    )
    assert shown.split() == []


def test_typing_marker_is_there():
    assert (ROOT / "trlpatch" / "py.typed").is_file()
