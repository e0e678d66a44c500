"""Facts about this machine, without importing torch or vLLM: those take seconds, and start CUDA."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trlpatch.versions import installed_distribution, installed_version

GIB = 2**30
PACKAGES = (
    "trlpatch", "trl", "vllm", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "ray", "gguf",
    "xllamacpp", "vllm-gguf-plugin",
)  # fmt: skip
_TOOLS = ("gcc", "g++", "cmake", "llama-quantize")
_SECONDS = 20
"""nvidia-smi takes a second or two where the driver's persistence mode is off."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA device as nvidia-smi describes it; `capability` is (major, minor), memory in bytes.

    On integrated devices (GB10) nvidia-smi knows no memory of the device's own: None.
    """

    name: str
    capability: tuple[int, int] | None
    total: int | None
    free: int | None


@dataclass(frozen=True)
class Machine:
    """What the checks look at; tests make their own.

    Attributes:
        system: "Linux", "Darwin", "Windows".
        wsl: Linux under Windows.
        processor: "x86_64", "aarch64", ...
        distribution: as in /etc/os-release: (ID, VERSION_ID), empty where unknown.
        python: (major, minor).
        gpus: in nvidia-smi's order, whatever CUDA_VISIBLE_DEVICES says; empty without nvidia-smi.
        driver_cuda: newest CUDA that the driver can run.
        amd: ROCm's tools, or a torch built for ROCm, are there.
        torch_cuda: CUDA that the installed torch was built for; None for a CPU build or no torch.
        memory: bytes that this process may use: of the machine, or of its cgroup where that is less.
        disk_free: bytes where models are kept.
        models: the directory where models are kept.
        tools: path by name of what is on PATH.
        gcc: major version, None where there is none.
        packages: installed version by distribution, None where it is not installed.
        torch_pin: what the installed vLLM demands of torch.
        environment: environment variables.
        hub_login: a token of Hugging Face's hub is set or was saved by `hf auth login`.
    """

    system: str = "Linux"
    wsl: bool = False
    processor: str = "x86_64"
    distribution: tuple[str, str] = ("", "")
    python: tuple[int, int] = (3, 12)
    gpus: tuple[Gpu, ...] = ()
    driver_cuda: tuple[int, int] | None = None
    amd: bool = False
    torch_cuda: tuple[int, int] | None = None
    memory: int | None = None
    disk_free: int | None = None
    models: str = ""
    tools: Mapping[str, str] = field(default_factory=dict)
    gcc: int | None = None
    packages: Mapping[str, str | None] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    hub_login: bool = False


def look_at_machine() -> Machine:
    """Return the facts about this machine. Starts nvidia-smi and gcc, imports nothing, connects to nothing."""
    gpus, driver_cuda = _nvidia()
    torch_version = _torch_version()
    models = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub"))
    models = models.expanduser()
    tools = {name: place for name in (*_TOOLS, "nvidia-smi") if (place := shutil.which(name))}
    return Machine(
        system=platform.system(),
        wsl="microsoft" in platform.release().lower(),
        processor=platform.machine(),
        distribution=_distribution(),
        python=sys.version_info[:2],
        gpus=gpus,
        driver_cuda=driver_cuda,
        amd=bool(shutil.which("rocminfo")) or "hip: Optional[str] = '" in torch_version,
        torch_cuda=_pair(re.search(r"^cuda\b[^=]*= '(\d+)\.(\d+)", torch_version, re.MULTILINE)),
        memory=_memory(),
        disk_free=_disk_free(models),
        models=str(models),
        tools=tools,
        gcc=_gcc(tools.get("gcc")),
        packages={name: installed_version(name) for name in PACKAGES},
        environment=dict(os.environ),
        hub_login=_hub_login(),
    )


def _nvidia() -> tuple[tuple[Gpu, ...], tuple[int, int] | None]:
    query = ["--query-gpu=name,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits"]
    gpus = []
    for line in _output("nvidia-smi", *query).splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4:
            name, capability, total, free = cells
            gpus.append(
                Gpu(name, _pair(re.fullmatch(r"(\d+)\.(\d+)", capability)), _mebibytes(total), _mebibytes(free))
            )
    if not gpus:
        return (), None
    return tuple(gpus), _pair(re.search(r"CUDA Version:\s*(\d+)\.(\d+)", _output("nvidia-smi")))


def _mebibytes(cell: str) -> int | None:
    return int(cell) * 2**20 if cell.isdigit() else None  # "[N/A]" where CPU and GPU have the same memory


def _pair(match: re.Match[str] | None) -> tuple[int, int] | None:
    return (int(match[1]), int(match[2])) if match else None


def _torch_version() -> str:
    """Return torch/version.py, which names the CUDA it was built for; importing torch takes seconds."""
    distribution = installed_distribution("torch")
    try:
        return Path(str(distribution.locate_file("torch/version.py"))).read_text("utf-8") if distribution else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _distribution() -> tuple[str, str]:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return "", ""
    return release.get("ID", ""), release.get("VERSION_ID", "")


def _memory() -> int | None:
    try:
        known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError, AttributeError):
        return None
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(place).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if limit.isdigit():  # "max": none
            known.append(int(limit))
    return min(known)


def _disk_free(place: Path) -> int | None:
    existing = next((one for one in (place, *place.parents) if one.exists()), None)
    try:
        return shutil.disk_usage(existing).free if existing else None
    except OSError:
        return None


def _gcc(path: str | None) -> int | None:
    version = _output(path, "-dumpversion").partition(".")[0].strip() if path else ""
    return int(version) if version.isdigit() else None


def _hub_login() -> bool:
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    saved = os.environ.get("HF_TOKEN_PATH") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "token")
    return Path(saved).expanduser().is_file()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
