"""Facts about a machine: what nvidia-smi, gcc and torch's files say, played by small programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trlpatch.doctor import machine as facts
from trlpatch.doctor.machine import look_at_machine

SMI = """\
#!/bin/sh
if [ "$1" = "" ]; then
    echo "| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |"
else
    echo "NVIDIA H100 80GB HBM3, 9.0, 81559, 81000"
    echo "NVIDIA GB10, 12.1, [N/A], [N/A]"
fi
"""


def program(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def test_what_nvidia_smi_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", SMI)
    program(tmp_path, "gcc", "#!/bin/sh\necho 12.3\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = look_at_machine()
    assert [(gpu.name, gpu.capability) for gpu in found.gpus] == [
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA GB10", (12, 1)),
    ]
    assert found.gpus[0].total == 81559 * 2**20
    assert found.gpus[1].total is None
    assert (found.driver_cuda, found.gcc) == ((13, 0), 12)


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho 'No devices were found'\n", "garbage"])
def test_an_nvidia_smi_that_fails_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program(tmp_path, "nvidia-smi", text)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert look_at_machine().gpus == ()


def test_an_nvidia_smi_that_hangs_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(facts, "_SECONDS", 0.2)
    assert look_at_machine().gpus == ()


@pytest.mark.parametrize(
    ("line", "cuda"),
    [("cuda: Optional[str] = '12.8'", (12, 8)), ("cuda = '13.0'", (13, 0)), ("cuda: Optional[str] = None", None)],
)
def test_the_cuda_that_torch_was_built_for(monkeypatch: pytest.MonkeyPatch, line: str, cuda: object) -> None:
    monkeypatch.setattr(
        facts, "_torch_version", lambda: f"__version__ = '2.11.0'\n{line}\nhip: Optional[str] = None\n"
    )
    assert (look_at_machine().torch_cuda, look_at_machine().amd) == (cuda, False)


def test_neither_torch_nor_vllm_is_imported() -> None:
    code = (
        "import sys; from trlpatch.doctor.diagnosis import diagnose; diagnose(); "
        "print({'torch', 'vllm'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
