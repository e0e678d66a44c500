"""What PatchFastRL makes of files that are not where the target table has them, or that cannot be read."""

from __future__ import annotations

import sys
import types

import pytest

from tests.helpers import SKIP
from trlpatch import errors
from trlpatch.runtime import session


def test_absent_targets_are_named(fake_trl):
    report = session.PatchFastRL(skip=SKIP)
    said = "no file of TRL 0.25.0 defines RLOOTrainer; trlpatch knows it at trl/trainer/rloo_trainer.py"
    assert report.absent["rloo"] == said
    assert "not in this TRL:\n" in str(report.full())
    assert f"  rloo: {said}\n" in str(report.full())
    assert report.to_dict()["absent"]["rloo"] == said


def test_an_algorithm_that_is_not_there_is_refused_at_every_call(fake_trl):
    for _ in range(2):
        with pytest.raises(errors.UnknownAlgorithm, match=r"defines RLOOTrainer.*This release has: grpo\.$"):
            session.PatchFastRL("rloo", skip=SKIP)
        session.PatchFastRL(skip=SKIP)


def test_what_inherits_from_grpo_must_be_there(fake_trl):
    with pytest.raises(errors.UnknownAlgorithm, match=r"'papo'.*no file of it defines PAPOTrainer"):
        session.PatchFastRL("papo", skip=SKIP)
    with pytest.raises(errors.UnknownAlgorithm, match=r"'gspo_token'.*gspo_token/grpo_trainer\.py is not there"):
        session.PatchFastRL("gspo_token", skip=SKIP)
    fake_trl.write("trainer/papo_trainer.py", "class PAPOTrainer: ...\n")
    assert session.PatchFastRL("papo", skip=SKIP).applied


def test_a_trl_without_any_trainer_does_not_fit(fake_trl):
    (fake_trl.root / "trainer/grpo_trainer.py").unlink()
    with pytest.raises(errors.PatchError, match=r"no file of TRL 0\.25\.0 defines GRPOTrainer"):
        session.PatchFastRL(skip=SKIP)


def test_a_trainer_that_moved_does_not_fit(fake_trl):
    fake_trl.write("trainer/rloo/trainer.py", "if True:\n    class RLOOTrainer: ...\n")
    moved = r"RLOOTrainer is now in trl/trainer/rloo/trainer\.py; trlpatch knows it at trl/trainer/rloo_trainer\.py"
    with pytest.raises(errors.PatchError, match=moved) as raised:
        session.PatchFastRL(skip=SKIP)
    assert 'PatchFastRL("grpo") patches what one trainer needs; these fit: grpo\n' in str(raised.value)
    with pytest.raises(errors.UnknownAlgorithm, match=rf"{moved}.*This release has: grpo\."):
        session.PatchFastRL("rloo", skip=SKIP)
    with pytest.warns(errors.LeftStock, match=moved):
        report = session.PatchFastRL(skip=SKIP, on_drift="stock")
    assert {entry.target for entry in report.applied} == {"grpo", "grpo_config"}
    assert report.absent.keys() == {
        "rloo_config",
        "online_dpo",
        "online_dpo_config",
        "gold",
        "gold_config",
        "import_utils",
    }


@pytest.mark.parametrize(
    ("content", "line", "byte"), [(b"# caf\xe9\n", 1, "0xe9 at offset 5"), (b"x = 1\r\n\xff", 2, "0xff at offset 7")]
)
def test_a_file_that_is_not_utf_8_is_an_error_of_its_own(fake_trl, content, line, byte):
    file = fake_trl.write("trainer/grpo_trainer.py", "")
    file.write_bytes(content)
    for options in ({}, {"on_drift": "stock"}):
        with pytest.raises(errors.UnreadableSource, match=f"{file}:{line} is not UTF-8.*{byte}.*pip") as raised:
            session.PatchFastRL(skip=SKIP, **options)
        assert not isinstance(raised.value, errors.PatchError)


def test_a_module_without_a_spec_is_not_trl(fake_trl, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", types.ModuleType("trl"))
    with pytest.raises(errors.TrlNotFound, match=r"sys\.modules\['trl'\] is"):
        session.PatchFastRL()


def test_a_single_module_is_not_trl(fake_trl, tmp_path, monkeypatch):
    (tmp_path / "trl.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(errors.TrlNotFound, match=r"trl\.py, a single module"):
        session.PatchFastRL()
