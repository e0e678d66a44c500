"""Every kind of adapter, by every way: the export computes what PEFT computes, or is refused with the reason."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.export.kinds import KINDS, Kind, adapted, logits
from trlpatch.errors import CannotExport

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

WAYS = ("live", "checkpoint", "adapter")


def source_of(way: str, model: Any, directory: Path) -> Any:
    from trlpatch.export.opening import open_source

    if way == "live":
        return open_source(model)
    saved = directory / ("checkpoint-7" if way == "checkpoint" else "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(saved)
    return open_source(saved)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_export_computes_what_peft_computes(kind: Kind, way: str, tmp_path: Path) -> None:
    import dataclasses

    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from trlpatch.export.merged import write_merged

    known = {field.name for field in dataclasses.fields(getattr(peft, kind.config))}
    if kind.needs is not None and kind.needs not in known:
        return  # this PEFT cannot train such an adapter
    model = adapted(tmp_path / "base", kind)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    refused = kind.refused or (kind.refused_saved if way != "live" else None)
    if refused is not None:
        with pytest.raises(CannotExport, match=refused):
            write_merged(source_of(way, model, tmp_path), tmp_path / "out", dtype="float32")
        assert not (tmp_path / "out").exists()
        return
    wanted = logits(model, model.config.vocab_size)
    source = source_of(way, model, tmp_path)
    done = write_merged(source, tmp_path / "out", dtype="float32")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())  # nothing is merged into it
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    found = logits(loaded.float().eval(), model.config.vocab_size)
    bound = 2e-5 * float(wanted.max() - wanted.min())
    assert float((found - wanted).abs().max()) <= bound, done.verified
    assert bool(done.notes and "differ with the adapter" in done.notes[0]) == kind.untied


PLAIN = [kind for kind in KINDS if kind.name in ("plain", "rslora", "rank_pattern", "alpha_pattern", "lm_head")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_plain_lora_is_what_peft_merges_bit_for_bit(kind: Kind, way: str, tmp_path: Path) -> None:
    import torch

    model = adapted(tmp_path / "base", kind)
    found = {name: tensor for name, tensor, _ in source_of(way, model, tmp_path).stream()}
    merged = model.merge_and_unload().state_dict()
    assert set(found) == set(merged)
    assert [name for name, one in found.items() if not torch.equal(one, merged[name])] == []
