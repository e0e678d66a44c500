"""What the GPU runs share: random-weight models, one process per case, and the measure of a wrong rollout.

The measure is the *gap*: the mean difference, in nats, between the log-probability that the engine reports for a token
it sampled and the one that the training model gives it at that moment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.runs.judge import last_error
from tests.runs.trainers import PROMPTS
from tests.words import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]

TOLERANCE = 0.02
"""Largest gap of a right rollout: bfloat16 in two implementations gives 0.005 to 0.010 on these models."""

DRIFT = 5 * TOLERANCE
"""What rollouts from other weights must exceed at the end of a control run."""

SHAPES: dict[str, dict[str, Any]] = {
    "0.1b": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
             "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": False},
    # The layers of Qwen2.5-0.5B and 7B. A vocabulary of 512 can learn something in thirty steps.
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip


def random_model(shape: str, root: Path = Path("/tmp/trlpatch-gpu-models")) -> Path:
    """Save a random-weight Qwen2 in bfloat16 and a tokenizer trained on the spot, once; return the directory.

    In a process of its own, so that this one holds no memory of the device.
    """
    directory = root / shape
    if not (directory / "tokenizer.json").exists():
        command = [sys.executable, "-m", "tests.gpu.common", shape, str(directory)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return directory


def _save_random_model(shape: str, directory: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = byte_tokenizer(PROMPTS * 4, vocabulary=512)
    config = Qwen2Config(
        **SHAPES[shape], max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    words.save_pretrained(directory)  # last: it says that the directory is complete


def run_child(script: Path, words: list[str], *, trl: Path | None = None, timeout: int, **environ: str) -> Any:
    """Run `script --child words...` in another process and return what it reports, or an error; never raises."""
    paths = [str(path) for path in (trl, ROOT) if path is not None] + [os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **environ,
    }
    command = [sys.executable, str(script.resolve()), "--child", *words]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        tail = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else str(error.stderr)
        return {"error": f"no end after {timeout} s: {tail[-300:]}"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"error": last_error(done.stderr), "status": done.returncode}


def report(result: Any) -> None:
    """In a child: hand the result to `run_child`."""
    print("RESULT " + json.dumps(result), flush=True)


def scores(engine: Any, words: Any, request: Any = None) -> list[float]:
    """Teacher-forced log-probabilities of fixed sequences' own tokens."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": words(text * 4)["input_ids"]} for text in PROMPTS]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    return [
        step[token].logprob
        for output in engine.generate(prompts, params, lora_request=request, use_tqdm=False)
        for step, token in list(zip(output.prompt_logprobs, output.prompt_token_ids, strict=True))[1:]
    ]


def milliseconds(call: Callable[[], Any]) -> float:
    """Wall time of one call, device work included."""
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def set_adapter(model: Any, *, seed: int, size: float = 0.02) -> None:
    """Give every LoRA parameter other random values, in place, as an optimizer step would."""
    import torch

    generator = torch.Generator(device=model.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.copy_(noise * size)


def used_gib() -> float:
    """GiB of the device that are in use, by whomever."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return float(total - free) / 2**30


if __name__ == "__main__":
    _save_random_model(sys.argv[1], Path(sys.argv[2]))
