"""`from_pretrained` without an engine: adapters, full fine-tuning, and checkpoints that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import base_model, lora_model, randomize  # noqa: E402
from tests.words import byte_tokenizer  # noqa: E402
from trlpatch import FastLanguageModel, FastModel, is_bf16_supported, is_bfloat16_supported  # noqa: E402
from trlpatch.errors import (  # noqa: E402
    AdapterNotExpressible,
    ConflictingArguments,
    CudaRequired,
    MissingPackage,
    ModelNotFound,
)
from trlpatch.loading import adapter_source  # noqa: E402
from trlpatch.loading.checkpoint import read_hf_config  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402

pytestmark = pytest.mark.torch

PLAIN: dict[str, Any] = {"load_in_4bit": False, "fast_inference": False}
IDS = [[1, 5, 9, 13]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and an adapter that PEFT saved for it."""
    root = tmp_path_factory.mktemp("models")
    base = base_model()
    base.save_pretrained(root / "base")
    words = byte_tokenizer(["one two three"] * 20, vocabulary=300)
    words.save_pretrained(root / "base")
    model = lora_model(base_from(root / "base"), rank_pattern={"v_proj": 6})
    randomize(model)
    model.save_pretrained(root / "adapter")
    return {"base": root / "base", "adapter": root / "adapter"}


def base_from(place: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place)


def logits(model: Any) -> Any:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits


def changed(adapter: Path, where: Path, **config: Any) -> Path:
    """A copy of the adapter whose configuration says something else."""
    shutil.copytree(adapter, where)
    file = where / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return where


@pytest.mark.parametrize("calls", [FastLanguageModel, FastModel])
def test_an_adapter_is_loaded_over_its_base_model(places: dict[str, Path], calls: Any) -> None:
    from peft import PeftModel

    model, tokenizer = calls.from_pretrained(places["adapter"], **PLAIN)
    reference = PeftModel.from_pretrained(base_from(places["base"]), places["adapter"])
    assert torch.allclose(logits(model), logits(reference))
    assert not torch.allclose(logits(model), logits(base_from(places["base"])))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert tokenizer.padding_side == "left"
    assert callable(model.fast_generate)
    model.train()
    model(input_ids=torch.tensor(IDS)).logits.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_it_is_trained_as_it_is(places: dict[str, Path]) -> None:
    model, _ = FastLanguageModel.from_pretrained(places["adapter"], **PLAIN)
    with pytest.raises(ConflictingArguments, match=r"has an adapter already.* or train it as it is"):
        FastLanguageModel.get_peft_model(model)


def test_the_tokenizer_saved_with_it_is_its_own(places: dict[str, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(places["adapter"], tmp_path / "adapter")
    words = byte_tokenizer(["one two three"] * 20, vocabulary=300)
    words.chat_template = "{{ 'of the adapter' }}"
    words.save_pretrained(adapter)
    _, tokenizer = FastLanguageModel.from_pretrained(adapter, **PLAIN)
    assert tokenizer.chat_template == "{{ 'of the adapter' }}"
    assert FastLanguageModel.from_pretrained(places["adapter"], **PLAIN)[1].chat_template != tokenizer.chat_template


def test_a_subfolder_is_the_adapters(places: dict[str, Path]) -> None:
    model, _ = FastLanguageModel.from_pretrained(places["adapter"].parent, subfolder="adapter", **PLAIN)
    assert lora_view(model) is not None


def test_revisions_go_where_peft_has_them(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = changed(places["adapter"], tmp_path / "adapter", revision="of-the-base")
    seen: dict[str, Any] = {}
    real = adapter_source.of_base

    def noted(config: Any, source: Any) -> Any:
        made = real(config, source)
        seen.update(arguments=source.arguments, base=made.revision, name=made.model_name, rank=made.max_lora_rank)
        return made

    monkeypatch.setattr(adapter_source, "of_base", noted)
    FastLanguageModel.from_pretrained(adapter, revision="of-the-adapter", max_lora_rank=4, **PLAIN)
    assert seen == {
        "arguments": {"revision": "of-the-adapter"},
        "base": "of-the-base",
        "name": str(places["base"]),
        "rank": 6,
    }


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"base_model_name_or_path": "/nowhere/model"},
            r"is a PEFT adapter of '/nowhere/model'.*found nothing there.*Write where .*PeftModel\.from_pretrained\(",
        ),
        ({"base_model_name_or_path": None}, "does not say of which model it is: expected base_model_name_or_path"),
    ],
)
def test_a_base_model_that_is_not_there(
    places: dict[str, Path], tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    adapter = changed(places["adapter"], tmp_path / "adapter", **config)
    with pytest.raises(ModelNotFound, match=says):
        FastLanguageModel.from_pretrained(adapter, **PLAIN)


@pytest.mark.parametrize("text", ["{", '{"peft_type": "NONSENSE", "base_model_name_or_path": "x"}'])
def test_a_configuration_that_peft_cannot_read(places: dict[str, Path], tmp_path: Path, text: str) -> None:
    adapter = changed(places["adapter"], tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ModelNotFound, match=r"its adapter_config\.json is no configuration that the installed PEFT"):
        FastLanguageModel.from_pretrained(adapter, **PLAIN)


def test_a_directory_with_both(places: dict[str, Path], tmp_path: Path) -> None:
    both = shutil.copytree(places["adapter"], tmp_path / "both")
    shutil.copy(places["base"] / "config.json", both)
    with pytest.raises(ConflictingArguments, match=r"has a model .config.json. and a PEFT adapter"):
        FastLanguageModel.from_pretrained(both, **PLAIN)


def test_a_repository_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(name: str, file: str, *, subfolder: str | None = None) -> str:
        asked.append((file, subfolder))
        return file

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ConflictingArguments, match=r"the repository has a model .config.json. and a PEFT adapter"):
        FastLanguageModel.from_pretrained("someone/both", subfolder="last", **PLAIN)
    assert asked == [("adapter_config.json", "last"), ("config.json", "last")]


def test_a_model_in_a_subfolder(places: dict[str, Path]) -> None:
    root, name = places["base"].parent, places["base"].name
    model, _ = FastLanguageModel.from_pretrained(root, subfolder=name, **PLAIN)
    assert model.config.vocab_size == base_from(places["base"]).config.vocab_size
    with pytest.raises(ModelNotFound, match="found none in its subfolder 'nowhere'"):
        FastLanguageModel.from_pretrained(root, subfolder="nowhere", **PLAIN)


def test_an_engine_has_no_subfolder() -> None:
    config = SimpleNamespace(model={"subfolder": "base"}, model_name="place", fast_inference=True)
    with pytest.raises(ConflictingArguments, match=r"vLLM loads no model from a subfolder.*'place/base'"):
        read_hf_config(config)  # type: ignore[arg-type]


def test_a_directory_with_neither(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="found none in it"):
        FastLanguageModel.from_pretrained(tmp_path, **PLAIN)


def test_full_finetuning_trains_every_weight(places: dict[str, Path]) -> None:
    model, _ = FastLanguageModel.from_pretrained(places["base"], full_finetuning=True, fast_inference=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConflictingArguments, match="train it as it is, or load it without full_finetuning"):
        FastLanguageModel.get_peft_model(model)
    with pytest.raises(ConflictingArguments, match="is a PEFT adapter, and full_finetuning=True"):
        FastLanguageModel.from_pretrained(places["adapter"], full_finetuning=True, fast_inference=False)
    with pytest.raises(AdapterNotExpressible, match="has no PEFT adapter to save"):
        model.save_lora("anywhere")


@pytest.mark.parametrize("flag", ["full_finetuning", "load_in_8bit"])
def test_a_quantized_checkpoint_is_neither_trained_nor_quantized_again(
    places: dict[str, Path], tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trlpatch.loading import load_config, platform_checks

    monkeypatch.setattr(load_config, "check_packages", lambda config: None)
    monkeypatch.setattr(platform_checks, "require_devices", lambda config: config)
    place = shutil.copytree(places["base"], tmp_path / "quantized")
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConflictingArguments, match=rf"{flag}=True, but .* is quantized already \(gptq\)"):
        FastLanguageModel.from_pretrained(place, **PLAIN, **{flag: True})


def test_eight_bits_need_a_gpu(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from trlpatch.loading import load_config

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(load_config, "check_packages", lambda config: None)
    with pytest.raises(CudaRequired, match="load_in_8bit=True needs a CUDA device"):
        FastLanguageModel.from_pretrained(places["base"], load_in_8bit=True, **PLAIN)
    assert (is_bfloat16_supported(), is_bf16_supported()) == (False, False)


def test_a_vocabulary_is_resized(places: dict[str, Path]) -> None:
    model, _ = FastLanguageModel.from_pretrained(places["base"], resize_model_vocab=80, **PLAIN)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 80


def test_a_model_that_reads_images_is_not_loaded_for_text(tmp_path: Path) -> None:
    from transformers import Qwen2VLConfig

    Qwen2VLConfig().save_pretrained(tmp_path)
    with pytest.raises(ConflictingArguments, match=r"reads images \(Qwen2VLConfig\); load it with FastVisionModel"):
        FastLanguageModel.from_pretrained(tmp_path, **PLAIN)


def test_images_need_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from transformers import Qwen2VLConfig

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchvision" else find(name))
    Qwen2VLConfig().save_pretrained(tmp_path)
    with pytest.raises(
        MissingPackage, match=r"need torchvision, which is not installed. Run: pip install torchvision"
    ):
        FastModel.from_pretrained(tmp_path, **PLAIN)


def test_sound_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen2AudioConfig

    Qwen2AudioConfig().save_pretrained(tmp_path)
    with pytest.raises(ConflictingArguments, match=r"reads audio \(Qwen2AudioConfig\): sound is not supported"):
        FastModel.from_pretrained(tmp_path, **PLAIN)


@pytest.mark.parametrize("every", [{"full_finetuning": True}])
def test_every_weight_of_a_vision_model_is_not_trained_beside_an_engine(every: dict[str, Any]) -> None:
    from types import SimpleNamespace

    from trlpatch.loading.images import read_as_images

    config: Any = SimpleNamespace(images=True, fast_inference=True, model_name="model", **every)
    with pytest.raises(ConflictingArguments, match="stays in the engine's cache when the weights are written anew"):
        read_as_images(config, SimpleNamespace(vision_config=object()))
