"""A TRL that cannot be patched, or was not: stand-ins, half-finished imports, stock trainers beside an engine."""

from __future__ import annotations

import pytest

from tests.helpers import SKIP

PATCH = f"import trlpatch\ntrlpatch.PatchFastRL('grpo', skip={SKIP!r})\n"
WATCH = "from trlpatch.engine import stock_trainers\nstock_trainers.watch()\n"
IMPORT = "import trl\ntrl.GRPOTrainer\n"
SHOW = "import sys\nprint('_trlpatch' in vars(sys.modules['trl.trainer.grpo_trainer']))\n"
SAID = (
    "a model of this process carries an engine, but trl.trainer.grpo_trainer is imported as TRL wrote it, and "
    "PatchFastRL() is not in force here: a stock GRPOTrainer does not use that engine."
)


@pytest.mark.parametrize("code", [WATCH + IMPORT, IMPORT + WATCH, WATCH + WATCH + IMPORT + WATCH])
def test_a_stock_trainer_beside_an_engine_is_told_of_once(fake_trl, code):
    done = fake_trl.python(code + "import sys\nprint(stock_trainers._watch in sys.meta_path)")
    assert done.stdout == "False\n"
    assert done.stderr.count(SAID) == 1, done.stderr


@pytest.mark.parametrize(
    "code", [PATCH + WATCH + IMPORT, WATCH + PATCH + IMPORT, WATCH + "import trl\n" + PATCH + IMPORT]
)
def test_a_patched_trainer_is_not(fake_trl, code):
    done = fake_trl.python(code + IMPORT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("code", [PATCH + "trlpatch.unpatch()\n" + WATCH, PATCH + WATCH + "trlpatch.unpatch()\n"])
def test_after_unpatch_it_is(fake_trl, code):
    assert SAID in fake_trl.python(code + IMPORT).stderr


RLOO = "import trl.trainer.rloo_trainer\n"


@pytest.mark.parametrize("code", [PATCH + WATCH + RLOO, WATCH + PATCH + RLOO, PATCH + RLOO + WATCH])
def test_a_trainer_that_the_call_did_not_name_is_told_of(fake_trl, code):
    fake_trl.write("trainer/rloo_trainer.py", "class RLOOTrainer:\n    pass\n")
    done = fake_trl.python(code)
    said = (
        "trl.trainer.rloo_trainer is imported as TRL wrote it, and PatchFastRL() does not patch it here: a stock RLOO"
    )
    assert done.stderr.count(said) == 1, done.stderr


@pytest.mark.parametrize(
    "code", [PATCH + WATCH, PATCH + "import trl.experimental.online_dpo.online_dpo_trainer\n" + WATCH]
)
def test_where_a_trainer_is_not_in_this_release_is_not(fake_trl, code):
    """TRL keeps a file at the old place of a trainer that moved: 0.25 has OnlineDPOTrainer in trl/trainer."""
    fake_trl.write("experimental/__init__.py", "")
    fake_trl.write("experimental/online_dpo/__init__.py", "")
    fake_trl.write("experimental/online_dpo/online_dpo_trainer.py", "")
    done = fake_trl.python(code + IMPORT + "import trl.experimental.online_dpo.online_dpo_trainer\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_stock_on_purpose_is_not(fake_trl):
    assert fake_trl.python(WATCH + IMPORT, TRLPATCH_DISABLE="1").stderr == ""


def test_other_modules_of_trl_are_not(fake_trl):
    assert fake_trl.python(WATCH + "import trl.trainer.dppo_config").stderr == ""


@pytest.mark.parametrize(
    "stand_in",
    ["types.ModuleType('trl')", "object()", "types.SimpleNamespace(__spec__=ModuleSpec('trl', None))"],
)
def test_a_stand_in_for_trl_is_named(fake_trl, stand_in):
    done = fake_trl.python(
        f"import sys, types\nfrom importlib.machinery import ModuleSpec\nsys.modules['trl'] = {stand_in}\n{PATCH}"
    )
    assert "trlpatch.errors.TrlNotFound: sys.modules['trl'] is " in done.stderr
    assert "expected TRL's package" in done.stderr


def test_a_folder_called_trl_is_named(fake_trl, tmp_path):
    fake_trl.root.rename(tmp_path / "away")
    (fake_trl.root / "trl").mkdir(parents=True)
    done = fake_trl.python(PATCH)
    assert f"a directory without __init__.py: {fake_trl.root}. A folder of that name comes first" in done.stderr


def test_patching_while_trl_is_being_imported_reaches_its_trainers(fake_trl):
    """`import trl` runs code that patches: nothing of TRL's trainers is there yet, so they come patched."""
    text = (fake_trl.root / "__init__.py").read_text(encoding="utf-8")
    fake_trl.write("__init__.py", f"{PATCH}{text}")
    done = fake_trl.python(IMPORT + SHOW)
    assert done.stdout == "True\n", done.stderr


def test_a_trainer_that_is_half_imported_is_refused(fake_trl):
    text = (fake_trl.root / "trainer/grpo_trainer.py").read_text(encoding="utf-8")
    fake_trl.write("trainer/grpo_trainer.py", text.replace("import functools\n", f"import functools\n{PATCH}", 1))
    done = fake_trl.python(IMPORT)
    assert "trlpatch.errors.PatchError: trl.trainer.grpo_trainer.GRPOTrainer cannot be patched after its import" in (
        done.stderr
    )
    assert "the import of this module is unfinished" in done.stderr


def test_a_failed_import_of_trl_leaves_submodules_that_are_patched_in_place(fake_trl):
    init = (fake_trl.root / "__init__.py").read_text(encoding="utf-8")
    fake_trl.write("__init__.py", "import trl.trainer.grpo_trainer\nraise ImportError('half')\n")
    done = fake_trl.python(
        "import sys, warnings\nwarnings.simplefilter('ignore')\n"
        "try:\n    import trl\nexcept ImportError:\n    pass\n"
        "print('trl' in sys.modules, 'trl.trainer.grpo_trainer' in sys.modules)\n"
        f"open({str(fake_trl.root / '__init__.py')!r}, 'w').write({init!r})\n"
        "import importlib\nimportlib.invalidate_caches()\n"
        + PATCH
        + IMPORT
        + "print('_trlpatch' in vars(sys.modules['trl.trainer.grpo_trainer']))"
    )
    assert done.stdout == "False True\nTrue\n", done.stderr
