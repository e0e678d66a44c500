"""tests/ports.py: no two processes pick from the same ports, whatever starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ports

ROOT = Path(__file__).parents[1]

PRINTS = "import os; os.write(1, '{VLLM_PORT} {MASTER_PORT}\\n'.format_map(os.environ).encode())"

STARTS_OTHERS = f"""
import json, os, subprocess, sys
from tests import ports

ports.own()
prints = [sys.executable, "-c", {PRINTS!r}]
pipe = {{"stdout": subprocess.PIPE, "text": True}}
here = "{{VLLM_PORT}} {{MASTER_PORT}}".format_map(os.environ)
first, second = subprocess.Popen(prints, **pipe), subprocess.Popen(prints, env=dict(os.environ), **pipe)
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, "{{VLLM_PORT}} {{MASTER_PORT}}".format_map(os.environ).encode())
    os._exit(0)
os.wait()
chosen = {{**os.environ, "VLLM_PORT": "7", "MASTER_PORT": "8"}}
found = {{
    "this": here,
    "first": first.communicate()[0],
    "second": second.communicate()[0],
    "forked": os.read(read, 99).decode(),
    "chosen": subprocess.run(prints, env=chosen, check=True, **pipe).stdout,
    "without": subprocess.run([sys.executable, "-c", "import os; print('VLLM_PORT' in os.environ)"],
                              env={{"PATH": os.environ["PATH"]}}, check=True, **pipe).stdout,
}}
print(json.dumps(found))
"""


def run(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The first of 19 ports that nobody else touches, with blocks of five."""
    block = ports.claim()
    monkeypatch.setattr(ports, "SIZE", 5)
    yield block.master
    block.close()


def test_a_block_is_claimed_once_until_it_is_closed(free: int) -> None:
    block = ports.Block(free)
    with pytest.raises(OSError, match="in use"):
        ports.Block(free)
    block.close()
    ports.Block(free).close()


def test_a_block_with_a_port_in_use_is_left_alone(free: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free + 4))
        with pytest.raises(OSError, match="in use"):
            ports.Block(free)
    ports.Block(free).close()


@pytest.mark.parametrize(
    ("range_of_kernel", "end"),
    [("32768\t60999\n", 32_000), ("26000 60999", 26_000), ("1024 65535", 32_000), (None, 32_000)],
)
def test_blocks_lie_below_what_the_kernel_chooses_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_of_kernel: str | None, end: int
) -> None:
    monkeypatch.setattr(ports, "_LOCAL_RANGE", tmp_path / "range")
    if range_of_kernel is not None:
        (tmp_path / "range").write_text(range_of_kernel, encoding="ascii")
    assert ports._end() == end


def test_every_process_that_is_started_or_forked_has_a_block_of_its_own() -> None:
    found = json.loads(run(STARTS_OTHERS, VLLM_PORT="1", MASTER_PORT="2"))
    assert (found.pop("chosen"), found.pop("without")) == ("7 8\n", "False\n")
    blocks = {name: [int(port) // ports.SIZE for port in text.split()] for name, text in found.items()}
    assert all(vllm == master for vllm, master in blocks.values()), blocks
    assert len({vllm for vllm, _ in blocks.values()}) == len(blocks) == 4, blocks


def test_ranks_of_a_launcher_keep_the_port_at_which_they_meet() -> None:
    code = f"from tests import ports; ports.own(); {PRINTS}"
    vllm, master = run(code, VLLM_PORT="1", MASTER_PORT="2", TORCHELASTIC_RUN_ID="none").split()
    assert (master, int(vllm) >= ports.FIRST) == ("2", True)
