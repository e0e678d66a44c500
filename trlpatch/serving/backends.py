"""Backends: which installed server fits an artifact, and the command that starts it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from trlpatch.errors import ConflictingArguments, MissingPackage, NotServable
from trlpatch.serving.artifact import Artifact
from trlpatch.serving.names import BACKENDS, LLAMA_CPP, VLLM, XLLAMACPP
from trlpatch.versions import installed_release, installed_version, pip_install, vllm_missing

GGUF_PLUGIN = "vllm-gguf-plugin"
GGUF_LEFT_VLLM = Version("0.24")
"""Up to 0.23 vLLM reads GGUF itself, on CUDA alone; from 0.24 on the plugin does."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank` (`MaxLoRARanks`) that every release with LoRA on its V1 engine accepts."""

XLLAMACPP_SERVER = Path(__file__).with_name("xllamacpp_server.py")

OURS = frozenset({"--host", "--port", "--model", "-m", "--uds", "--lora-modules"})
"""Options of the servers that are arguments here."""


@dataclass(frozen=True)
class Launch:
    """How a server is started and asked.

    Attributes:
        backend: who serves.
        command: the process, without the interpreter's own options.
        model: the name that requests give.
        ready: the path that answers with 200, or 401 where it wants a key, once the server is ready.
        key: the API key that requests need, if any.
        dtype: what `--dtype` says, "auto" where nothing does.
    """

    backend: str
    command: tuple[str, ...]
    model: str
    ready: str
    key: str | None = None
    dtype: str = "auto"


def choose(artifact: Artifact, backend: str = "auto", *, cuda: Callable[[], bool] | None = None) -> str:
    """Return the backend that serves `artifact` here.

    Raises:
        MissingPackage: none that fits is installed; the message has the command that installs one.
        NotServable: `backend` cannot serve such an artifact at all, or not on this machine.
    """
    if backend not in BACKENDS:
        raise ConflictingArguments(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
    if artifact.kind != "gguf":
        if backend not in ("auto", VLLM):
            raise NotServable(
                f"{artifact.path} is a {_words(artifact)}, and {backend} serves GGUF files. Leave --backend out, or "
                f"convert it first: trlpatch export gguf {artifact.path} --out DIR"
            )
        _require_vllm(artifact)
        return VLLM
    return _for_gguf(artifact, backend, cuda or cuda_available)


def _for_gguf(artifact: Artifact, backend: str, cuda: Callable[[], bool]) -> str:
    if backend == VLLM:
        _require_vllm(artifact)
        if not cuda():
            raise NotServable(
                f"{artifact.path}: vLLM serves GGUF files on CUDA alone, and torch finds no CUDA device. Leave "
                f"--backend out and: {pip_install('serve')}"
            )
        if not _vllm_reads_gguf():
            raise MissingPackage(
                f"{artifact.path}: vLLM {installed_version('vllm')} serves GGUF files with {GGUF_PLUGIN}, which is "
                f"not installed. Run: pip install {GGUF_PLUGIN}"
            )
        return VLLM
    if backend == "auto" and _there("vllm") and _vllm_reads_gguf() and cuda():
        return VLLM
    for name, module in ((XLLAMACPP, "xllamacpp"), (LLAMA_CPP, "llama_cpp")):
        if backend in ("auto", name) and _there(module):
            if name == LLAMA_CPP and not _there("uvicorn"):
                raise MissingPackage(
                    "llama-cpp-python is installed without its server. Run: pip install llama-cpp-python[server]"
                )
            return name
    if backend == LLAMA_CPP:
        raise MissingPackage(
            "llama-cpp-python is not installed. Run: pip install llama-cpp-python[server] (it compiles llama.cpp), or "
            f"without a compiler, and without --backend: {pip_install('serve')}"
        )
    on_cuda = f", or on CUDA: {pip_install('vllm')} {GGUF_PLUGIN}" if backend == "auto" else ""
    raise MissingPackage(
        f"{artifact.path} is a GGUF file, and nothing here serves those: "
        f"{'no xllamacpp, no llama-cpp-python' if backend == 'auto' else 'no xllamacpp'}. "
        f"Run: {pip_install('serve')}{on_cuda}"
    )


def launch(
    artifact: Artifact,
    backend: str,
    *,
    host: str,
    port: int,
    name: str | None = None,
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    logprobs: bool = False,
) -> Launch:
    """Return how `backend` is started for `artifact`; `options` are the server's own, as its command line has them.

    Raises:
        ConflictingArguments: `options` hold what is an argument here.
    """
    for option in options:
        flag = option.partition("=")[0].replace("_", "-")
        if flag in OURS:
            raise ConflictingArguments(f"{flag} is an option of `trlpatch serve` itself: give it before `--`")
        if flag.startswith("--ssl-"):
            raise ConflictingArguments(f"{flag}: `trlpatch serve` speaks http alone; put TLS into a proxy before it")
    served = name or artifact.name
    key = option_value(options, "--api-key", "--api-keys", "--api_key")
    if backend == VLLM:
        served = option_value(options, "--served-model-name") or served
        key = key or (environment or {}).get("VLLM_API_KEY")
        dtype = option_value(options, "--dtype") or "auto"
        command = _vllm(artifact, served, host, port, options)
        return Launch(backend, command, served, "/health", key, dtype)
    if backend == XLLAMACPP:
        python = ("-P", str(XLLAMACPP_SERVER), str(artifact.path), host, str(port), served)
        return Launch(backend, (sys.executable, *python, *options), served, "/health", key)
    llama = ("-P", "-m", "llama_cpp.server", "--model", str(artifact.path), "--model_alias", served)
    place = ("--host", host, "--port", str(port), *(("--logits_all", "true") if logprobs else ()))
    return Launch(backend, (sys.executable, *llama, *place, *options), served, "/v1/models", key)


def _vllm(artifact: Artifact, served: str, host: str, port: int, options: Sequence[str]) -> tuple[str, ...]:
    model = artifact.base if artifact.kind == "adapter" else str(artifact.path)
    assert model is not None
    # -P: a file of the working directory must not stand before an installed module.
    words = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", model]
    words += ["--host", host, "--port", str(port)]
    given = {option.partition("=")[0] for option in options}
    if artifact.kind == "adapter":
        words += ["--enable-lora", "--lora-modules", _lora_module(served, artifact)]
        if "--max-lora-rank" not in given:
            words += ["--max-lora-rank", str(_legal_rank(artifact))]
        if "--served-model-name" not in given:
            words += ["--served-model-name", _base_name(model, served)]
    elif "--served-model-name" not in given:
        words += ["--served-model-name", served]
    tokenizer = artifact.tokenizer or (artifact.base if artifact.kind == "gguf" else None)
    if tokenizer is not None and "--tokenizer" not in given:
        words += ["--tokenizer", str(tokenizer)]
    return (*words, *options)


def _lora_module(served: str, artifact: Artifact) -> str:
    """`NAME=DIR`, or JSON where one of both holds a character that vLLM's parser splits at."""
    path = str(artifact.path)
    plain = not {"=", ","} & {*served, *path}
    return f"{served}={path}" if plain else json.dumps({"name": served, "path": path})


def _legal_rank(artifact: Artifact) -> int:
    legal = next((rank for rank in LORA_RANKS if rank >= artifact.rank), None)
    if legal is None:
        raise NotServable(
            f"{artifact.path} has rank {artifact.rank}, above {LORA_RANKS[-1]}, vLLM's largest. Merge it into its "
            f"base model: trlpatch export merged {artifact.path} --out DIR"
        )
    return legal


def _base_name(base: str, served: str) -> str:
    """A name of the base model that is not the adapter's."""
    name = Path(base).name if Path(base).is_dir() else base
    return name if name != served else f"{name}-base"


def option_value(options: Sequence[str], *names: str) -> str | None:
    """Return the value that `options` give one of `names`, the last one that is given."""
    found = None
    for index, option in enumerate(options):
        flag, equals, value = option.partition("=")
        if flag in names:
            found = value if equals else next(iter(options[index + 1 : index + 2]), None)
    return found


def cuda_available() -> bool:
    """Whether torch, where it is installed, finds a CUDA device."""
    if not _there("torch"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def _require_vllm(artifact: Artifact) -> None:
    if not _there("vllm"):
        raise MissingPackage(
            f"{vllm_missing(f'{artifact.path} is a {_words(artifact)}, which vLLM serves')}, or serve a GGUF file of "
            f"it: trlpatch export gguf {artifact.path} --out DIR"
        )


def _vllm_reads_gguf() -> bool:
    release = installed_release("vllm")
    return (release is not None and release < GGUF_LEFT_VLLM) or installed_version(GGUF_PLUGIN) is not None


def _words(artifact: Artifact) -> str:
    return {"model": "transformers model", "adapter": "PEFT adapter", "gguf": "GGUF file"}[artifact.kind]


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
