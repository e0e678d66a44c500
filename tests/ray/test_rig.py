"""What the runs on a real cluster stand on (rig.py, fault_cases.py): nothing of it waits for ever. Without Ray."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest

from tests.ray import fault_cases, rig

pytestmark = pytest.mark.cpu  # the rig sets vLLM's environment


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In the place of `ray._private.services`."""
    private, made = types.ModuleType("ray._private"), types.ModuleType("ray._private.services")
    private.services = made  # type: ignore[attr-defined]
    for name, module in {"ray": types.ModuleType("ray"), "ray._private": private}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "ray._private.services", made)
    monkeypatch.setattr(rig, "raylet_runs", lambda: True)
    return made


def test_the_raylet_is_waited_for_longer_than_ray_does_and_not_for_ever(
    services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def get_node(address: str, node: str) -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise RuntimeError("not there yet")
        return f"{node} at {address}"

    services.get_node = get_node
    with rig.patience(600.0):
        assert services.get_node("here", "one") == "one at here"
    assert services.get_node is get_node
    tries = -1000
    with rig.patience(0.0), pytest.raises(RuntimeError):
        services.get_node("here", "one")
    monkeypatch.setattr(rig, "raylet_runs", lambda: False)
    with rig.patience(600.0), pytest.raises(RuntimeError):
        services.get_node("here", "one")


def test_daemons_of_a_start_that_failed_are_ended_and_no_others() -> None:
    sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
    words = [*sleeps, "--session-dir=/tmp/raysomewhere/one"]
    with subprocess.Popen(words) as of_it, subprocess.Popen(sleeps) as other:
        try:
            rig.end_daemons("/tmp/raysomewhere")
            assert of_it.wait(60) == -9
            assert other.poll() is None
        finally:
            of_it.kill()
            other.kill()


@pytest.mark.parametrize(
    ("code", "why"),
    [("print('no word'); raise SystemExit(3)", "has ended with status 3"), ("input()", "was not up in 0 s")],
    ids=["ends", "hangs"],
)
def test_a_driver_that_does_not_come_up_is_an_error(code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile("w+") as said:
        words = [sys.executable, "-c", code]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=said) as driver:
            if why.startswith("was"):
                monkeypatch.setattr(fault_cases, "DRIVER_SECONDS", 0.0)
            with pytest.raises(AssertionError, match=why):
                fault_cases.told_by(driver, said)
            assert driver.returncode is not None


def test_logs_of_a_cluster_that_failed_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "session_2026" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("Check failed: it\n" + "".join(f"line {number}\n" for number in range(100)))
    (logs / "worker-1.err").write_text("")
    rig.show_logs(tmp_path, lines=2)
    assert capsys.readouterr().err == "end of raylet.out:\n  Check failed: it\n  line 98\n  line 99\n"
