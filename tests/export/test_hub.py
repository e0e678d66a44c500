"""Uploads: nothing is exported in vain, and nothing that was exported is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.export.kinds import Kind, adapted
from trlpatch.errors import CannotExport
from trlpatch.export import api

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

PLAIN = Kind("plain", {"target_modules": ["q_proj", "down_proj"]})


class Hub:
    """A stand-in for huggingface_hub.HfApi; `fails` names the call that raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[dict[str, Any]] = []
        hub = self

        class Api:
            def __init__(self, token: Any = None) -> None:
                self.token = token

            def create_repo(self, repo_id: str, **options: Any) -> Any:
                return hub.call("create_repo", repo_id=repo_id, token=self.token, **options)

            def upload_folder(self, **options: Any) -> Any:
                return hub.call("upload_folder", token=self.token, **options)

        monkeypatch.setattr("huggingface_hub.HfApi", Api)

    def call(self, name: str, **options: Any) -> Any:
        self.calls.append({"call": name, **options})
        if name == self.fails:
            raise ConnectionError("offline mode is enabled")
        return type("Repo", (str,), {"repo_id": options["repo_id"]})("https://address")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return adapted(tmp_path / "base", PLAIN)


def _push(call: str, model: Any, **options: Any) -> Any:
    return getattr(api, call)(model, "me/model", None, **options)


@pytest.mark.parametrize("call", ["push_to_hub_merged", "push_to_hub_gguf"])
def test_without_a_way_to_the_hub_nothing_is_exported(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    hub = Hub(monkeypatch, "create_repo")
    for name in ("_write", "_gguf"):
        monkeypatch.setattr(api, name, lambda *options: pytest.fail("exported before the hub was asked"))
    with pytest.raises(CannotExport, match=r"offline mode.*nothing was exported.*hf auth login.*token="):
        _push(call, model, token="")
    assert [one["token"] for one in hub.calls] == [None]


def test_what_was_exported_outlives_an_upload_that_fails(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    hub = Hub(monkeypatch, "upload_folder")
    with pytest.raises(CannotExport, match=r"offline mode.*hf upload me/model ") as caught:
        _push("push_to_hub_merged", model)
    kept = next((tmp_path / "tmp").glob("*/export"))
    assert str(kept) in str(caught.value)
    assert (kept / "model.safetensors").is_file()
    hub.fails = ""
    assert _push("push_to_hub_merged", model, revision="v2", create_pr=True) == "https://address"
    assert hub.calls[-1]["revision"] == "v2"
    assert list((tmp_path / "tmp").glob("*/export")) == [kept]
    with pytest.raises(CannotExport, match="adapter='none'"):
        _push("push_to_hub_merged", model, adapter="none")
    assert list((tmp_path / "tmp").iterdir()) == [kept.parent]


def test_a_saved_export_stays_when_the_hub_cannot_be_reached(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch, "create_repo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CannotExport, match="the export is complete in 'me/model'"):
        api.save_pretrained_merged(model, "me/model", save_method="lora", push_to_hub=True, private=True)
    assert (tmp_path / "me" / "model" / "adapter_model.safetensors").is_file()


def test_the_files_that_were_written_are_uploaded_and_not_what_lies_beside_them(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "optimizer.pt").write_bytes(b"private")
    made = type("Made", (), {"paths": [Path("out/m-q8_0.gguf"), Path("out/m-f16.gguf")]})()
    monkeypatch.setattr(api, "_gguf", lambda *options: made)
    api.save_pretrained_gguf(model, "out", None, ["q8_0", "f16"], push_to_hub=True, token="t", private=True)
    assert hub.calls[0]["private"] is True
    assert hub.calls[1]["allow_patterns"] == ["m-q8_0.gguf", "m-f16.gguf"]
    assert {one["token"] for one in hub.calls} == {"t"}
