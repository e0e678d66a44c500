"""The checks of the doctor, on machines that are made up: one thing is wrong with each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trlpatch.doctor.checks import machine_checks
from trlpatch.doctor.machine import GIB, Gpu, Machine
from trlpatch.versions import pip_install

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB)
GOOD = Machine(
    distribution=("ubuntu", "24.04"),
    gpus=(H100,),
    driver_cuda=(13, 0),
    torch_cuda=(12, 8),
    memory=128 * GIB,
    disk_free=500 * GIB,
    models="/models",
    gcc=13,
    packages={"torch": "2.11.0", "vllm": "0.26.0", "bitsandbytes": "0.48.1", "gguf": "0.19.0", "xllamacpp": "1"},
    hub_login=True,
)


def levels(machine: Machine) -> dict[str, str]:
    return {one.check: one.level for one in machine_checks(machine) if one.level in ("warn", "fail")}


def test_a_good_machine_has_nothing_to_complain_of() -> None:
    assert levels(GOOD) == {}


@pytest.mark.parametrize(
    ("changes", "check", "level", "words"),
    [
        ({"system": "Darwin"}, "system", "fail", "needs Linux"),
        ({"distribution": ("ubuntu", "18.04")}, "system", "warn", "Ubuntu 20.04"),
        ({"processor": "aarch64"}, "system", "warn", "wheels"),
        ({"gpus": ()}, "gpu", "fail", "fast_inference=False"),
        ({"gpus": (), "amd": True}, "gpu", "warn", "limited"),
        ({"gpus": (Gpu("GTX 1080", (6, 1), 24 * GIB, 24 * GIB),)}, "gpu", "fail", "7.0"),
        ({"gpus": (Gpu("Tesla T4", (7, 5), 16 * GIB, 16 * GIB),)}, "gpu", "warn", "float16"),
        ({"gpus": (Gpu("RTX 3060", (8, 6), 12 * GIB, 12 * GIB),)}, "gpu", "warn", "16 GB"),
        ({"gpus": (replace(H100, free=10 * GIB),)}, "gpu", "warn", "gpu_memory_utilization"),
        ({"gpus": (Gpu("NVIDIA GB10", (12, 1), None, None),)}, "DGX Spark", "warn", "TRLPATCH_VLLM_ON_GB10=1"),
        ({"driver_cuda": (12, 2), "torch_cuda": (13, 0)}, "CUDA", "fail", "update the driver"),
        ({"torch_cuda": None}, "CUDA", "fail", pip_install("vllm")),
        ({"driver_cuda": None}, "CUDA", "warn", "does not say"),
        ({"memory": 8 * GIB}, "memory", "warn", "16 GB"),
        ({"disk_free": 10 * GIB}, "disk", "warn", "HF_HOME"),
        ({"gcc": None}, "compiler", "warn", "gcc"),
        ({"gcc": 8}, "compiler", "warn", "gcc 9"),
        ({"environment": {"VLLM_USE_V1": "0"}}, "environment", "fail", "unset it"),
        ({"environment": {"PYTORCH_ALLOC_CONF": "expandable_segments: True"}}, "environment", "warn", "sleep"),
        ({"environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}}, "environment", "warn", "another process"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": ""}}, "environment", "fail", "hides every GPU"),
        ({"environment": {"WORLD_SIZE": "two"}}, "environment", "fail", "expected a whole number"),
    ],
)
def test_what_is_wrong_is_found_and_says_what_to_do(
    changes: dict[str, Any], check: str, level: str, words: str
) -> None:
    machine = replace(GOOD, **changes)
    assert levels(machine) == {check: level}
    (result,) = [one for one in machine_checks(machine) if one.check == check and one.level == level]
    assert words in f"{result.found} {result.advice} {result.command}"


def said(machine: Machine, check: str) -> str:
    return " ".join(f"{one.level} {one.found} {one.advice}" for one in machine_checks(machine) if one.check == check)


def test_what_is_merely_worth_knowing() -> None:
    packages = {**GOOD.packages, "vllm": "0.14.1"}
    blackwell = replace(GOOD, gpus=(Gpu("NVIDIA B200", (10, 0), 180 * GIB, 180 * GIB),), packages=packages)
    assert "TRITON_DISABLE_PDL=1" in said(blackwell, "Blackwell")
    assert said(replace(blackwell, packages=GOOD.packages), "Blackwell") == ""
    assert "/tmp" in said(replace(GOOD, environment={"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}), "host")
    assert "Colab" in said(replace(GOOD, environment={"COLAB_RELEASE_TAG": "x"}), "host")
    assert "vllm-gguf-plugin" in said(GOOD, "GGUF")
    cpu = replace(GOOD, gpus=(), packages={**GOOD.packages, "vllm": "0.28.0+cpu"})
    assert said(cpu, "gpu").startswith("skip")


def test_secrets_are_never_shown() -> None:
    machine = replace(GOOD, environment={"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "secret"})
    assert "secret" not in " ".join(f"{one.found}{one.advice}" for one in machine_checks(machine))
