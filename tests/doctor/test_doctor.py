"""`trlpatch doctor` as it is called, and the table of error messages."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from trlpatch.cli import cli
from trlpatch.cli.doctor import doctor
from trlpatch.doctor import diagnosis, package_checks
from trlpatch.doctor.checks import Result
from trlpatch.doctor.diagnosis import Diagnosis, diagnose
from trlpatch.doctor.known_errors import KNOWN_ERRORS, as_markdown, look_up
from trlpatch.doctor.machine import Machine
from trlpatch.errors import TrlNotFound
from trlpatch.runtime.compat.removed import EVERY, Removed
from trlpatch.versions import pip_install

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    found = [Result("system", "ok", "Linux"), Result("gpu", "warn", "small", "take a larger one")]
    monkeypatch.setattr(diagnosis, "diagnose", lambda: Diagnosis(tuple(found)))
    return found


def test_status_and_summary_follow_the_worst_result(results: list[Result]) -> None:
    done = CliRunner().invoke(cli, ["doctor"])
    assert (done.exit_code, "can work here, with limits (gpu)" in done.output) == (0, True)
    assert "warn  gpu     small: take a larger one" in done.output
    results.append(Result("TRL", "fail", "not there"))
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    said = json.loads(done.output)
    assert (done.exit_code, said["healthy"]) == (1, False)
    assert said["summary"] == "rollouts on vLLM cannot work here: TRL"
    assert said["results"][-1] == {"check": "TRL", "level": "fail", "found": "not there", "advice": "", "command": ""}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_command_is_whole_on_one_line(
    results: list[Result], terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f'pip install -e "{"/long" * 20}[vllm]"'
    results[1:1] = [Result("vLLM", "fail", "not installed", "words " * 20, command)]
    out = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    assert doctor.callback is not None
    with pytest.raises(SystemExit):
        doctor.callback(message=None, log=None, as_json=False)
    lines = out.getvalue().splitlines()
    if terminal:
        (at,) = [number for number, line in enumerate(lines) if line.strip() == command]
        assert all(len(line) <= 80 for number, line in enumerate(lines) if number != at)
        starts = [line.index(word) for line in lines for word in ("Linux", "not installed", "small") if word in line]
        assert len({*starts}) == 1, "columns stay below each other"
    else:
        assert f"fail  vLLM    not installed: {'words ' * 20}: {command}" in lines


def test_this_environment_is_diagnosed() -> None:
    found = {one.check: one for one in diagnose().results}
    assert found["Python"].found == ".".join(map(str, sys.version_info[:2]))
    assert {"system", "memory", "disk", "TRL", "hub"} <= set(found)


def test_an_old_python_and_old_packages_are_named() -> None:
    machine = Machine(python=(3, 10), packages={"peft": "0.9.0", "torch": "2.11.0+cpu", "ray": "nightly"})
    found = {one.check: one.level for one in package_checks.package_checks(machine)}
    assert (found["Python"], found["peft"], "torch" in found, "ray" in found) == ("fail", "warn", False, False)


def test_without_trl_the_other_packages_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise TrlNotFound("TRL is not installed. Run: pip install trl")

    monkeypatch.setattr(package_checks, "find_trl", none)
    found = {one.check: one for one in package_checks.package_checks(Machine(packages={"torch": "2.11.0"}))}
    assert [found[name].level for name in ("TRL", "vllm, transformers", "peft")] == ["fail", "fail", "warn"]
    assert found["TRL"][2:] == ("TRL is not installed.", "", "pip install trl")
    assert found["vllm, transformers"].command == f"{pip_install('vllm')} transformers"
    assert found["peft"].command == "pip install peft"
    every = dict.fromkeys(("torch", "vllm", "transformers", "peft"), "99")
    assert [one.check for one in package_checks.package_checks(Machine(packages=every))] == ["Python", "TRL"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Unsloth: Please install vLLM before enabling `fast_inference`!",
            "Please install vLLM before enabling fast_inference",
        ),
        ("ImportError: vllm not found", "Please install vLLM before enabling fast_inference"),
        (
            "Unsloth: set `fast_inference = True` when doing `load_in_fp8`.",
            "set fast_inference=True when doing load_in_fp8",
        ),
        ("DGX Spark detected - `fast_inference=True` is currently broken", "DGX Spark detected"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "CUDA out of memory"),
        ("vLLM initialization failed", "vLLM initialization failed"),
        ("vLLM health check timeout", "vLLM health check timeout"),
        (
            "ValueError: Prefix caching is currently not supported for v0.",
            "Prefix caching is currently not supported for v0",
        ),
        (
            "The server socket has failed to listen on any local network address. port: 34943, code: -98",
            "The server socket has failed to listen on any local network address",
        ),
        ("LoRA rank 64 is greater than max_lora_rank 16.", "LoRA rank is greater than max_lora_rank"),
    ],
)
def test_known_messages_are_explained(text: str, message: str) -> None:
    assert message in [known.message for known in look_up(text)]
    done = CliRunner().invoke(cli, ["doctor", "--error", text])
    assert (done.exit_code, message in done.output) == (0, True)


def test_every_message_finds_itself_and_an_unknown_one_nothing() -> None:
    for known in KNOWN_ERRORS:
        assert known in list(look_up(known.message)), known.message
    assert not list(look_up("KeyError: 'input_ids'"))
    done = CliRunner().invoke(cli, ["doctor", "--error", "KeyError: 'input_ids'"])
    assert (done.exit_code, "docs/troubleshooting.md" in done.output) == (2, True)


@pytest.mark.parametrize(
    "line",
    [
        "Free memory on device (78.1/79.2 GiB) on startup. Desired GPU memory utilization is (0.5, 39.6 GiB).",
        "INFO VLLM_USE_V1=1",
        "adapter with LoRA rank 16",
        "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True",
    ],
)
def test_what_healthy_logs_and_other_errors_say_is_no_error(line: str) -> None:
    assert not list(look_up(line))


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_every_argument_that_is_gone_is_known(one: Removed) -> None:
    found = list(look_up(f"TypeError: X.__init__() got an unexpected keyword argument '{one.name}'"))
    assert ["docs/compat.md" in known.solution for known in found] == [True]


def test_a_log_is_read_from_a_file_or_stdin(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_bytes(b"\xff step 3\ntorch.OutOfMemoryError: CUDA out of memory\n")
    for words, given in ((["--log", str(log)], None), (["--log", "-"], "CUDA out of memory")):
        done = CliRunner().invoke(cli, ["doctor", "--json", *words], input=given)
        assert [one["message"] for one in json.loads(done.output)] == ["CUDA out of memory"]


def test_the_docs_hold_the_table() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert as_markdown() in page, "paste trlpatch.doctor.known_errors.as_markdown()"
