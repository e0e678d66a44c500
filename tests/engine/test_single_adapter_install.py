"""Which engines get single-adapter LoRA layers, and what of vLLM is changed while they are built. Needs vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from trlpatch.engine.single_adapter import install, layers, linear  # noqa: E402
from trlpatch.engine.single_adapter.storage import rows_of, with_rows  # noqa: E402
from trlpatch.errors import ConflictingArguments  # noqa: E402

pytestmark = pytest.mark.cpu

ALLOWED: dict[str, Any] = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture
def of_one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's linear layers as in an engine on one device."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers import linear as theirs

    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=1, rank_in_group=0))
    with set_current_vllm_config(VllmConfig()):
        yield theirs


def test_weights_are_made_with_rows_below_them_and_look_as_ever(of_one_device: Any) -> None:
    with with_rows(16):
        merged = of_one_device.MergedColumnParallelLinear(32, [40, 40], bias=False)
        replicated = of_one_device.ReplicatedLinear(32, 40, bias=False)
    rows: Any = rows_of(merged)
    assert (rows.base, rows.rank, rows.parts) == (80, 16, 2)
    assert rows.full.shape == (128, 32)  # 80 + 2 * 16, up to a multiple of 64
    assert merged.weight.shape == (80, 32)
    assert merged.weight.data_ptr() == rows.full.data_ptr()
    assert merged.weight.is_contiguous()
    assert not rows.full[80:].any()
    merged.weight_loader(merged.weight, torch.ones(40, 32), 1)
    assert rows.full[40:80].eq(1).all()
    assert not rows.full[80:].any()
    assert rows_of(replicated) is None
    after = of_one_device.MergedColumnParallelLinear(32, [40, 40], bias=False)
    assert rows_of(after) is None


@pytest.mark.parametrize(
    ("device", "moved", "served"),
    [("cpu", False, True), ("cuda", False, True), ("cuda", True, False), ("xpu", False, False)],
)
def test_layers_keep_vllms_class_elsewhere_and_where_vllm_has_moved_their_weight(
    of_one_device: Any, device: str, moved: bool, served: bool
) -> None:
    with with_rows(16):
        row = of_one_device.RowParallelLinear(32, 64, bias=False)
    address = row.weight.data_ptr() + moved
    there = SimpleNamespace(device=torch.device(device), data_ptr=lambda: address)
    row.__class__ = type("There", (type(row),), {"weight": property(lambda _: there)})
    assert layers._served(row) == served


@pytest.mark.parametrize(
    ("changes", "variables", "reason"),
    [
        ({"max_loras": 2}, {}, "several adapter slots"),
        ({"tensor_parallel_size": 2}, {}, "several devices"),
        ({"fully_sharded_loras": True}, {}, "sharded"),
        ({"lora_dtype": "float16"}, {}, "a dtype of their own"),
        ({"enable_lora_bias": True}, {}, "biases"),
        ({"additional_config": object()}, {}, "additional_config"),
        ({}, {"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}, "VLLM_LORA_ENABLE_DUAL_STREAM"),
        ({}, {"VLLM_BATCH_INVARIANT": "1"}, "VLLM_BATCH_INVARIANT"),
        ({}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, "another process"),
        ({"distributed_executor_backend": "mp"}, {}, "another process"),
    ],
)
def test_engines_that_they_do_not_fit_keep_vllms_and_say_why(
    changes: dict[str, Any], variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    arguments = {**ALLOWED, **changes}
    assert reason in str(install.why_not(arguments))
    with install.lora_layers(arguments, "auto") as given:
        assert given == arguments
    with pytest.raises(ConflictingArguments, match=reason), install.lora_layers(arguments, "trlpatch"):
        pass


def test_the_engine_that_trl_builds_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL leaves the variable alone; for its "external_launcher" vLLM sets it while the engine is built."""
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    given = {**ALLOWED, "tensor_parallel_size": 1, "distributed_executor_backend": "external_launcher"}
    assert install.why_not(given) is None
    assert "another process" in str(install.why_not(ALLOWED))


def test_vllms_classes_are_as_before_after_the_engine_is_built() -> None:
    from vllm.lora import utils
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    classes, create = utils._all_lora_classes, UnquantizedLinearMethod.create_weights
    with install.lora_layers({**ALLOWED, "additional_config": {"mine": 1}}, "auto") as given:
        assert utils._all_lora_classes is not classes
        assert given["additional_config"] == {"mine": 1, "trlpatch_single_adapter": linear.VERSION}
    with pytest.raises(RuntimeError, match="no memory"), install.lora_layers(ALLOWED, "auto"):
        raise RuntimeError("no memory")
    assert utils._all_lora_classes is classes
    assert UnquantizedLinearMethod.create_weights is create
    with install.lora_layers(ALLOWED, "vllm") as given:
        assert given == ALLOWED
        assert utils._all_lora_classes is classes
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_a_vllm_with_other_layers_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora import utils

    monkeypatch.delattr(utils, "_all_lora_classes")
    assert "other linear or LoRA layers" in str(install.why_not(ALLOWED))
