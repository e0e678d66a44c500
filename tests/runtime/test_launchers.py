"""The launchers that people use, under `trlpatch run`: `accelerate launch`, torchrun, and TRL's own command line."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import ports, processes
from tests.helpers import SKIP
from tests.runtime.conftest import REPOSITORY, FakeTrl
from trlpatch.source.locate import find_trl

pytest.importorskip("accelerate")

pytestmark = pytest.mark.torch  # read before the file is imported: tests/tiers.py

# one write: print() makes several where the stream is unbuffered, and the lines of two ranks on one pipe then mix
PROBE = """\
import os, sys, trl
patched = "_trlpatch" in vars(sys.modules[trl.GRPOTrainer.__module__])
os.write(1, f"{patched} {os.environ.get('RANK', '-')}\\n".encode())
"""
REWARD = """\
import os, trl
from trlpatch import options

def probe(completions, **_):
    return [0.0 for _ in completions]

code = trl.GRPOTrainer.__init__.__code__
print("PROBE", "_trlpatch" in code.co_names, options.active().sleep, flush=True)
raise SystemExit(0)
"""


def script(directory: Path, name: str, home: str, function: str = "main") -> Path:
    """Write the console script that pip makes of an entry point; the stack has none of TRL."""
    path = directory / "bin" / name
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {home} import {function}\nsys.exit({function}())\n", encoding="utf-8"
    )
    path.chmod(0o755)
    return path


def run(directory: Path, environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    return processes.run(
        [sys.executable, "-m", "trlpatch", "run", *map(str, words)],
        env={**environment, "PATH": f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        timeout=400,
        cwd=directory,
    )


@pytest.mark.parametrize(
    ("name", "home", "words", "ranks"),
    [
        ("accelerate", "accelerate.commands.accelerate_cli", "launch --cpu probe.py", 1),
        ("torchrun", "torch.distributed.run", "--nproc-per-node 2 --master-port {port} probe.py", 2),
        ("torchrun", "torch.distributed.run", "--nproc-per-node 2 --master-port {port} -m probe", 2),
    ],
)
def test_every_rank_is_patched_and_one_line_says_so(
    fake_trl: FakeTrl, tmp_path: Path, name: str, home: str, words: str, ranks: int
) -> None:
    script(tmp_path, name, home)
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    options = ["--algorithm", "grpo", *(word for one in SKIP for word in ("--skip", one))]
    port = ports.environment()["MASTER_PORT"]
    done = run(tmp_path, fake_trl.environment(), *options, name, *words.format(port=port).split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("True") == len(done.stdout.splitlines()) == ranks, done.stdout
    assert done.stderr.count("trlpatch: TRL 0.25.0") == 1


def test_drift_ends_a_launch_before_it_begins(fake_trl: FakeTrl, tmp_path: Path) -> None:
    script(tmp_path, "accelerate", "accelerate.commands.accelerate_cli")
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    fake_trl.drift()
    done = run(tmp_path, fake_trl.environment(), "--algorithm", "grpo", "accelerate", "launch", "--cpu", "probe.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert "patch    configure on grpo of TRL 0.25.0" in done.stderr


@pytest.mark.cpu
@pytest.mark.release
@pytest.mark.skipif(
    find_spec("trl") is None or find_trl().release < (0, 27),
    reason="runs TRL's own command line, which below 0.27 imports names that vLLM no longer has",
)
def test_trl_grpo_trains_in_a_patched_process(tmp_path: Path) -> None:
    script(tmp_path, "trl", "trl.cli")
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    path = [str(REPOSITORY), str(find_trl().root.parent), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRLPATCH_CACHE_DIR": str(tmp_path / "cache")}
    options = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    model = ["--model_name_or_path", "absent", "--dataset_name", "absent", "--reward_funcs", "reward.probe"]
    done = run(tmp_path, environment, "--sleep", "off", "trl", "grpo", *model, *options)
    assert "PROBE True off" in done.stdout.splitlines(), f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trlpatch: TRL ") == 1
