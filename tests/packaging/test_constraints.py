"""The constraints that README tells people to install with are versions that ran on a GPU."""

from __future__ import annotations

import pytest

from tests.packaging.constraints import FOLDER, LINES, ROOT, pins
from trlpatch.compatibility import tested


@pytest.mark.parametrize("file", LINES)
def test_what_is_pinned_trained_on_a_gpu(file: str) -> None:
    wanted = pins(file)
    ran = [
        run.trl
        for run in tested.load()
        if run.device == "gpu"
        and (run.vllm, run.transformers) == (wanted["vllm"], wanted["transformers"])
        and run.passed
    ]
    assert (wanted["trl"] in ran) if "trl" in wanted else "0.22.2" in ran


def test_readme_installs_with_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {file.name for file in FOLDER.iterdir()} == set(LINES)
    assert all(f"-c constraints/{file}" in readme for file in LINES)
