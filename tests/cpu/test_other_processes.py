"""Adapters handed to engines whose workers live in other processes."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.cpu.scenarios import TOLERANCE
from tests.processes import ROOT
from trlpatch.source.locate import find_trl
from trlpatch.source.releases import NEWEST_TESTED

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        find_trl().release != NEWEST_TESTED,
        reason="takes minutes, and TRL has no part in it: run with the newest pinned release only",
    ),
]


def main(directory: Path, ranks: int) -> None:
    """In a process of its own: three versions of an adapter, each with and without its request."""
    from vllm import SamplingParams

    import trlpatch
    from trlpatch.engine.describe import describe_engines

    model = tiny.checkpoint(directory / "model")
    engine = tiny.engine(model, tensor_parallel_size=ranks)
    policy = trlpatch.attach_engine(tiny.policy(model), engine)
    params = SamplingParams(max_tokens=8, logprobs=0, temperature=1.0, seed=0)
    found: dict[str, Any] = {"gaps": [], "control": [], "paths": []}
    for seed in range(3):
        tiny.move(policy, seed=seed)
        request = policy.load_lora()
        found["paths"].append(request.lora_path)
        for kind, given in (("gaps", request), ("control", None)):
            outputs = engine.generate(tiny.prompts(4), params, lora_request=given, use_tqdm=False)
            found[kind].append(max(gap(policy, output) for output in outputs))
    found["other"] = refusal(tiny.policy(tiny.checkpoint(directory / "other", seed=1)), engine)
    found |= {"engines": describe_engines(), "here": [path.name for path in Path().iterdir()]}
    print("RESULT " + json.dumps(found), flush=True)


def refusal(policy: Any, engine: Any) -> str | None:
    import trlpatch
    from trlpatch.errors import EngineMismatch

    try:
        trlpatch.attach_engine(policy, engine)
    except EngineMismatch as error:
        return str(error)
    return None


def gap(policy: Any, output: Any) -> float:
    trainer = tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)
    return float((tiny.engine_logprobs(output) - trainer).abs().max())


@pytest.mark.parametrize("ranks", [1, 2], ids=["engine core in another process", "tensor parallel"])
def test_each_rollout_has_the_adapter_and_nothing_is_written_here(ranks: int, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(tmp_path), str(ranks)]
    done = processes.run(command, cwd=here, env=environ, timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("RESULT "))
    assert max(found["gaps"]) < TOLERANCE
    assert min(found["control"]) > 100 * TOLERANCE
    assert "do not compute the same function" in str(found["other"]), "another checkpoint is refused there, too"
    assert "adapter through files in " in found["engines"][0]
    assert found["here"] == []
    assert len(set(found["paths"])) == 3
    assert not any(Path(path).exists() for path in found["paths"]), "the private directory went with the process"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
