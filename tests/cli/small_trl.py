"""A small TRL 0.18.2 in which every patch fits, and what the tests of the command line say about its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[2]

CONFIG = """
from dataclasses import dataclass, field


@dataclass
class {name}:
    use_vllm: bool = field(default=False)
    vllm_mode: str = field(default="server")
    vllm_server_host: str = field(default="0.0.0.0")
    vllm_server_port: int = field(default=8000)
    vllm_server_base_url: str | None = field(default=None)
    vllm_tensor_parallel_size: int = field(default=1)
    beta: float = field(default=0.1)

    def __post_init__(self):
        pass
"""

GRPO = """
def is_vllm_available():
    return False


if is_vllm_available():
    from vllm.sampling_params import GuidedDecodingParams


class GRPOTrainer:
    def __init__(self, model, args=None):
        self.use_vllm, self.vllm_mode = args.use_vllm, args.vllm_mode
        model_init_kwargs = {}
        model_init_kwargs["use_cache"] = model_init_kwargs.get("use_cache")
        model.warnings_issued["estimate_tokens"] = True
        self.llm = LLM(model=model.name_or_path)

    def _move_model_to_vllm(self):
        llm_model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        llm_model.load_weights(self.model)

    def _generate_and_score_completions(self, prompts):
        sampling_params = SamplingParams(n=1, guided_decoding=None)
        outputs = self.llm.generate(prompts, sampling_params=sampling_params)
        return outputs
"""

ONLINE_DPO = """
class OnlineDPOTrainer:
    def __init__(self, model, args=None):
        model.warnings_issued["estimate_tokens"] = True
        if args.use_vllm:
            self.llm = LLM(model=model.name_or_path)
        self.generation_config = SamplingParams(n=2)

    def get_train_dataloader(self):
        dataloader_params["worker_init_fn"] = seed_worker

    def _generate_vllm(self, model, prompts):
        llm_model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        llm_model.load_weights(model.state_dict().items())
        if prompts:
            outputs = self.llm.chat(prompts, self.generation_config)
        else:
            outputs = self.llm.generate(prompts, self.generation_config)
        return outputs

    def training_step(self, loss):
        if self.use_apex:
            loss.scale()

    def _maybe_log_save_evaluate(self, tr_loss):
        return self._nested_gather(tr_loss).mean().item()
"""

FILES = {
    "__init__.py": '__version__ = "0.18.2"\n',
    "import_utils.py": "from transformers.utils.import_utils import _is_package_available\n",
    "trainer/__init__.py": "",
    "trainer/grpo_config.py": CONFIG.format(name="GRPOConfig"),
    "trainer/grpo_trainer.py": GRPO,
    "trainer/online_dpo_config.py": CONFIG.format(name="OnlineDPOConfig"),
    "trainer/online_dpo_trainer.py": ONLINE_DPO,
}

TARGETS = ["grpo", "grpo_config", "online_dpo", "online_dpo_config", "import_utils"]


class Run(Protocol):
    def __call__(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]: ...


def fails(result: subprocess.CompletedProcess[str], status: int, *texts: str) -> None:
    """Assert a failure with one message on stderr and no traceback."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr


def install(site: Path, **versions: str) -> None:
    """Make distributions look installed beside the small TRL."""
    for name, version in versions.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def in_terminal(words: list[str], environment: dict[str, str], columns: int) -> str:
    """What a terminal of so many columns is sent."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    command = [sys.executable, "-m", "trlpatch", *words]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment) as process:
        os.close(theirs)
        sent = b""
        while True:
            try:
                sent += os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
    os.close(ours)
    assert process.returncode == 0, sent
    return sent.decode().replace("\r\n", "\n")
