"""Repairs of what TRL does while it is imported, in interpreters of their own with a tiny transformers and vLLM."""

from __future__ import annotations

import textwrap

import pytest

from tests.helpers import SKIP

IMPORT_UTILS = """\
from transformers.utils.import_utils import _is_package_available

_weave_available = _is_package_available("weave")
_vllm_available, _vllm_version = _is_package_available("vllm", return_version=True)
_every = (_weave_available, _vllm_available)
_unrelated = object()


def is_weave_available():
    return _weave_available
"""

TUPLE_TRANSFORMERS = """\
def _is_package_available(name, return_version=False):
    return (name == "vllm", "0.30.0" if return_version else None)
"""

PACKAGE = """\
import sys
import types

from .import_utils import is_weave_available

__version__ = "0.26.2"


class Lazy(types.ModuleType):
    def __init__(self, name, file, spec):
        super().__init__(name)
        self.__file__, self.__spec__, self.__path__ = file, spec, [file.rpartition("/")[0]]


sys.modules[__name__] = Lazy(__name__, globals()["__file__"], __spec__)

if True:
    import vllm.transformers_utils

    import vllm.transformers_utils.tokenizer

    def get_cached_tokenizer(tokenizer):
        return tokenizer

    vllm.transformers_utils.tokenizer.get_cached_tokenizer = get_cached_tokenizer
"""

HEAD = f"""
import sys, warnings
warnings.simplefilter("error")
import trlpatch
def patch():
    return trlpatch.PatchFastRL("grpo", skip={(*SKIP, "configure", "sampling_config")!r})
"""


@pytest.fixture
def trl(fake_trl):
    """The tiny TRL with a transformers that answers with tuples and a vLLM without its tokenizer module."""
    fake_trl.write("import_utils.py", IMPORT_UTILS)
    for file, text in {
        "transformers/__init__.py": "",
        "transformers/utils/__init__.py": "",
        "transformers/utils/import_utils.py": TUPLE_TRANSFORMERS,
        "vllm/__init__.py": "",
        "vllm/transformers_utils/__init__.py": "",
    }.items():
        fake_trl.write(f"../{file}", text)
    return fake_trl


def run(trl, code: str) -> str:
    done = trl.python(HEAD + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_absent_packages_are_absent_when_patched_before_import(trl):
    code = """
    patch()
    from trl import import_utils
    print(import_utils.is_weave_available(), import_utils._vllm_available, import_utils._vllm_version)
    trlpatch.unpatch()
    print(import_utils.is_weave_available(), hasattr(import_utils, "_trlpatch"))
    """
    assert run(trl, code).splitlines() == ["False True 0.30.0", "(False, None) False"]


def test_absent_packages_are_absent_when_patched_after_import(trl):
    code = """
    from trl import import_utils
    before = dict(vars(import_utils))
    report = patch()
    print(before["_weave_available"], import_utils.is_weave_available(), import_utils._every)
    print(import_utils._unrelated is before["_unrelated"], report.rebound, report.bypassed)
    trlpatch.unpatch()
    print(vars(import_utils).keys() == before.keys() and all(vars(import_utils)[k] is v for k, v in before.items()))
    """
    assert run(trl, code).splitlines() == ["(False, None) False (False, True)", "True () ()", "True"]


def test_the_package_itself_is_patched_and_keeps_its_place(trl):
    trl.write("__init__.py", PACKAGE)
    code = """
    report = patch()
    import trl
    import trl.trainer.grpo_config
    print(trl.__file__, trl.__path__, trl.trainer.grpo_config.__file__)
    print(report.bypassed, [entry.patch for entry in report.applied], report.files["trl"] != trl.__file__)
    trlpatch.unpatch()
    print(trl.__spec__.origin, type(trl.__spec__.loader).__name__)
    """
    own = str(trl.root / "__init__.py")
    assert run(trl, code).splitlines() == [
        f"{own} {[str(trl.root)]} {trl.root / 'trainer' / 'grpo_config.py'}",
        "() ['vllm_tokenizer', 'package_checks'] True",
        f"{own} SourceFileLoader",
    ]


def test_without_the_repair_the_package_cannot_be_imported(trl):
    trl.write("__init__.py", PACKAGE)
    assert "No module named 'vllm.transformers_utils.tokenizer'" in trl.python("import trl").stderr


def test_a_package_that_was_imported_before_stays_as_it_is(trl):
    trl.write("__init__.py", PACKAGE)
    trl.write("../vllm/transformers_utils/tokenizer.py", "")
    code = """
    import trl, vllm.transformers_utils.tokenizer as tokenizer
    own = tokenizer.get_cached_tokenizer
    report = patch()
    print(tokenizer.get_cached_tokenizer is own, report.rebound, report.bypassed, trl.__file__)
    trlpatch.unpatch()
    print(trl.__spec__.origin, hasattr(trl, "_trlpatch"))
    """
    own = str(trl.root / "__init__.py")
    assert run(trl, code).splitlines() == [f"True () () {own}", f"{own} False"]


def test_what_a_repair_provided_stays_where_trls_own_import_fails(trl):
    trl.version("1.9.2")
    for name in ("generation/__init__.py", "generation/vllm_generation.py"):
        trl.write(name, "class VLLMGeneration:\n    pass\n")
    trl.write("generation/vllm_client.py", "from requests.adapters import HTTPAdapter\n")
    code = """
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name == "requests":
                raise ModuleNotFoundError("No module named 'requests'", name=name)
    sys.meta_path.insert(0, Absent())
    patch()
    from trl.generation import vllm_client
    print(vllm_client.HTTPAdapter)
    trlpatch.unpatch()
    print(vllm_client.HTTPAdapter, hasattr(vllm_client, "_trlpatch"))
    """
    assert run(trl, code).splitlines() == ["None", "None False"]
