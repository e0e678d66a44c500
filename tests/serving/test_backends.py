"""Which server fits, what is said when none does, and the command that starts it."""

from __future__ import annotations

import importlib.machinery
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving import made
from trlpatch.errors import ConflictingArguments, MissingPackage, NotServable
from trlpatch.serving import backends
from trlpatch.serving.artifact import detect
from trlpatch.serving.backends import Launch, choose, launch, option_value
from trlpatch.versions import pip_install, vllm_missing

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make exactly these packages importable, vLLM in this version."""

    def only(*modules: str, vllm: str = "0.28.0", plugin: bool = False) -> None:
        monkeypatch.setattr(
            backends.importlib.util,
            "find_spec",
            lambda name: importlib.machinery.ModuleSpec(name, None) if name in modules else None,
        )
        versions = {"vllm": vllm} if "vllm" in modules else {}
        versions |= {"vllm-gguf-plugin": "0.0.5"} if plugin else {}
        monkeypatch.setattr(backends, "installed_version", versions.get)
        monkeypatch.setattr(backends, "installed_release", lambda name: backends.Version(versions[name]))

    return only


def there(command: Launch, *words: str) -> bool:
    """Whether these words are in the command, one after another."""
    line = list(command.command)
    return any(line[i : i + len(words)] == list(words) for i in range(len(line)))


def on(cuda: bool) -> Callable[[], bool]:
    return lambda: cuda


def test_models_and_adapters_are_served_by_vllm(tmp_path: Path, install: Install) -> None:
    model, adapter = made.model(tmp_path / "m"), made.adapter(tmp_path / "a", tmp_path / "m")
    install("vllm")
    assert choose(detect(model)) == choose(detect(adapter)) == "vllm"
    with pytest.raises(NotServable, match=f"trlpatch export gguf {model} --out DIR"):
        choose(detect(model), "xllamacpp")
    install("xllamacpp")
    with pytest.raises(MissingPackage, match=re.escape(vllm_missing(", which vLLM serves"))):
        choose(detect(adapter))


@pytest.mark.parametrize(
    ("modules", "vllm", "plugin", "cuda", "expected"),
    [
        (["vllm", "xllamacpp"], "0.28.0", True, True, "vllm"),
        (["vllm", "xllamacpp"], "0.28.0", False, True, "xllamacpp"),
        (["vllm", "xllamacpp"], "0.28.0", True, False, "xllamacpp"),
        (["vllm"], "0.23.0", False, True, "vllm"),
        (["xllamacpp", "llama_cpp", "uvicorn"], "", False, False, "xllamacpp"),
        (["llama_cpp", "uvicorn"], "", False, False, "llama-cpp-python"),
    ],
)
def test_a_gguf_file_is_served_by_what_is_there(
    tmp_path: Path, install: Install, modules: list[str], vllm: str, plugin: bool, cuda: bool, expected: str
) -> None:
    install(*modules, vllm=vllm, plugin=plugin)
    assert choose(detect(made.gguf(tmp_path / "m.gguf")), cuda=on(cuda)) == expected


@pytest.mark.parametrize(
    ("modules", "backend", "cuda", "texts"),
    [
        ([], "auto", False, ["no xllamacpp, no llama-cpp-python", pip_install("serve")]),
        (["vllm"], "auto", True, [f"{pip_install('vllm')} vllm-gguf-plugin"]),
        (["vllm"], "vllm", True, ["vLLM 0.28.0 serves GGUF files with vllm-gguf-plugin", "pip install vllm-gguf-"]),
        ([], "vllm", True, [pip_install("vllm")]),
        (["xllamacpp"], "llama-cpp-python", False, ["pip install llama-cpp-python[server]"]),
        (["llama_cpp"], "auto", False, ["without its server", "pip install llama-cpp-python[server]"]),
        (["llama_cpp", "uvicorn"], "xllamacpp", False, ["no xllamacpp. Run", pip_install("serve")]),
    ],
)
def test_what_is_missing_is_named_with_its_command(
    tmp_path: Path, install: Install, modules: list[str], backend: str, cuda: bool, texts: list[str]
) -> None:
    install(*modules)
    with pytest.raises(MissingPackage) as failed:
        choose(detect(made.gguf(tmp_path / "m.gguf")), backend, cuda=on(cuda))
    for text in texts:
        assert text in str(failed.value)


def test_vllm_serves_gguf_on_cuda_alone(tmp_path: Path, install: Install) -> None:
    install("vllm", plugin=True)
    with pytest.raises(NotServable, match="on CUDA alone"):
        choose(detect(made.gguf(tmp_path / "m.gguf")), "vllm", cuda=on(False))
    with pytest.raises(ConflictingArguments, match="backend='vlm'"):
        choose(detect(tmp_path / "m.gguf"), "vlm")


def command(path: Path, backend: str = "vllm", **words: object) -> Launch:
    return launch(detect(path), backend, host="127.0.0.1", port=8000, **words)  # type: ignore[arg-type]


def test_vllm_gets_the_directory_and_its_name(tmp_path: Path) -> None:
    made_command = command(made.model(tmp_path / "m"))
    assert there(made_command, "serve", str(tmp_path / "m"), "--host", "127.0.0.1", "--port", "8000")
    assert there(made_command, "--served-model-name", "m")
    assert (made_command.model, made_command.ready, made_command.dtype) == ("m", "/health", "auto")
    assert not there(made_command, "--enable-lora")


def test_vllm_gets_an_adapter_as_lora_module_on_its_base(tmp_path: Path) -> None:
    base = made.model(tmp_path / "base")
    place = made.adapter(tmp_path / "checkpoint-10", base, r=24)
    (place / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}', encoding="utf-8")
    found = command(place)
    assert there(found, "serve", str(base))
    assert there(found, "--enable-lora", "--lora-modules", f"checkpoint-10={place}", "--max-lora-rank", "32")
    assert there(found, "--served-model-name", "base")
    assert there(found, "--tokenizer", str(place))
    assert found.model == "checkpoint-10"


def test_an_adapter_never_has_the_name_of_its_base(tmp_path: Path) -> None:
    base = made.model(tmp_path / "tiny")
    found = command(made.adapter(tmp_path / "out" / "tiny", base))
    assert there(found, "--served-model-name", "tiny-base")


def test_a_name_that_vllms_parser_would_split_goes_as_json(tmp_path: Path) -> None:
    place = made.adapter(tmp_path / "lr=1e-5,r=8", "b/a")
    assert there(command(place), "--lora-modules", f'{{"name": "lr=1e-5,r=8", "path": "{place}"}}')


def test_a_rank_above_vllms_is_to_be_merged(tmp_path: Path) -> None:
    with pytest.raises(NotServable, match="rank 1024, above 512"):
        command(made.adapter(tmp_path / "a", "b/a", r=1024))


def test_options_of_the_server_come_last_and_take_the_place_of_ours(tmp_path: Path) -> None:
    place = made.adapter(tmp_path / "a", made.model(tmp_path / "m"))
    options = ["--max-lora-rank", "64", "--dtype=float32", "--api-key", "k", "--max-model-len", "256"]
    found = command(place, options=options)
    assert found.command[-len(options) :] == tuple(options)
    assert found.command.count("--max-lora-rank") == 1
    assert (found.dtype, found.key) == ("float32", "k")
    assert command(tmp_path / "m", options=["--served-model-name", "n"]).model == "n"
    assert command(tmp_path / "m", environment={"VLLM_API_KEY": "e"}).key == "e"


@pytest.mark.parametrize("option", ["--port", "--host=::", "--model", "--uds", "--lora_modules", "--ssl-keyfile"])
def test_options_that_are_arguments_here_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConflictingArguments, match=option.partition("=")[0].replace("_", "-")):
        command(made.model(tmp_path / "m"), options=[option, "1"])


def test_llama_cpp_servers_get_the_file(tmp_path: Path) -> None:
    file = made.gguf(tmp_path / "m.gguf")
    found = command(file, "xllamacpp", name="policy", options=["--n_ctx", "512"])
    assert found.command[-6:] == (str(file), "127.0.0.1", "8000", "policy", "--n_ctx", "512")
    assert found.ready == "/health"
    found = command(file, "llama-cpp-python")
    assert there(found, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", "m")
    assert found.ready == "/v1/models"
    assert not there(found, "--logits_all", "true")
    assert there(command(file, "llama-cpp-python", logprobs=True), "--logits_all", "true")


def test_vllm_reads_the_tokenizer_beside_a_gguf_file_or_of_its_base(tmp_path: Path) -> None:
    file = made.gguf(tmp_path / "m.gguf")
    found = launch(detect(file, base="b/a"), "vllm", host="::", port=1)
    assert there(found, "--tokenizer", "b/a")
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert there(command(file), "--tokenizer", str(tmp_path))


def test_the_value_of_an_option_is_the_last_one() -> None:
    assert option_value(["--a", "1", "--a=2"], "--a") == "2"
    assert option_value(["--a"], "--a") is None
    assert option_value(["--b", "--a"], "--c") is None
