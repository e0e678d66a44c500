"""The directory that an export makes: complete or not there, and only where it may be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.export.kinds import Kind, adapted
from trlpatch.errors import CannotExport, ExportMismatch

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

PLAIN = Kind("plain", {"target_modules": ["q_proj", "down_proj"]})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from trlpatch.export.opening import open_source

    return open_source(adapted(tmp_path_factory.mktemp("writing") / "base", PLAIN))


def write(source: Any, directory: Path, **options: Any) -> Any:
    from trlpatch.export.merged import write_merged

    return write_merged(source, directory, **{"verify": False, **options})


def test_shards_and_their_index_hold_every_tensor_once(source: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    done = write(source, tmp_path / "out", max_shard_size="100KB", dtype="float16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.bytes == source.size(source.tensors[0].read().half().dtype)
    found: dict[str, str] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), path.name)
        assert path.stat().st_size < 100_000 or len([1 for one in found.values() if one == path.name]) == 1
    assert found == index["weight_map"]
    assert set(found) == {one.name for one in source.tensors}


def test_what_is_there_is_replaced_only_where_it_is_an_export(source: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(source, out, dtype="float32")
    write(source, out, dtype="float16")  # an earlier export
    assert json.loads((out / "config.json").read_text())["dtype" if _new() else "torch_dtype"] == "float16"
    (out / "mine.txt").write_text("mine")
    with pytest.raises(CannotExport, match=r"'mine\.txt', which is not of an earlier export"):
        write(source, out)
    (out / "trlpatch_export.json").unlink()
    with pytest.raises(CannotExport, match="which is not of an earlier export"):
        write(source, out)
    assert (out / "mine.txt").read_text() == "mine"
    write(source, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotExport, match="found a file"):
        write(source, tmp_path / "file", overwrite=True)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "out"]


def _new() -> bool:
    """Does transformers write `dtype` into a config? 4.56 and newer."""
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)


def test_a_full_disk_is_found_before_anything_is_written(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(source.parameters * 2 + 1000))
    with pytest.raises(CannotExport, match="bytes are needed"):
        write(source, tmp_path / "deep" / "out", dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_export_leaves_what_was_there(
    source: Any, tmp_path: Path, error: type[BaseException], earlier: bool
) -> None:
    out = tmp_path / "out"
    if earlier:
        write(source, out, dtype="float32")

    def stop(what: str, done: int, of: int) -> None:
        if done > of // 2:
            raise error

    with pytest.raises(error):
        write(source, out, dtype="float16", progress=stop)
    assert [one.name for one in tmp_path.iterdir()] == (["out"] if earlier else [])
    assert not earlier or json.loads((out / "trlpatch_export.json").read_text())["dtype"] == "float32"


def _flip(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file, metadata={"format": "pt"})


def _swap(path: Path) -> None:
    """What no row of an adapted layer shows: another layer of the base in place of one."""
    from safetensors.torch import load_file, save_file

    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    one, two = (f"model.layers.{number}.mlp.gate_proj.weight" for number in (0, 1))
    tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [_flip, _swap])
def test_verification_finds_what_is_wrong_and_removes_it(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    from trlpatch.export import merged

    verify = merged.verify_export

    def damaged(source: Any, place: Path, *args: Any, **options: Any) -> str:
        damage(place)
        return verify(source, place, *args, **options)

    monkeypatch.setattr(merged, "verify_export", damaged)
    with pytest.raises(ExportMismatch):
        write(source, tmp_path / "out", verify=True, dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_without_the_adapter_is_found_however_small_the_adapter_is(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trlpatch.export import changes

    monkeypatch.setattr(changes, "_add_lora", lambda layer, adapter, weight: weight)
    with pytest.raises(ExportMismatch, match="within the rounding"):
        write(source, tmp_path / "out", verify=True, dtype="float16")


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    import torch

    from trlpatch.export.opening import open_source

    model = adapted(tmp_path / "base", PLAIN)
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.weight")[0, 0] = 1e6
    with pytest.raises(CannotExport, match="beyond 65504"):
        write(open_source(model), tmp_path / "out", dtype="float16")
    assert write(open_source(model), tmp_path / "out", dtype="bfloat16").bytes


def test_sizes_and_dtypes_that_are_none_are_named(source: Any, tmp_path: Path) -> None:
    for options, what in (
        ({"max_shard_size": "5 bananas"}, "max_shard_size"),
        ({"dtype": "int8"}, "dtype="),
        ({"verify": "yes"}, "verify="),
    ):  # fmt: skip
        with pytest.raises(CannotExport, match=what):
            write(source, tmp_path / "out", **options)
