"""Train GRPO on two ranks with an adapter that is sharded, loaded by FastLanguageModel, or on one engine over both.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.cpu.sharded_ranks CASE CHECKPOINT OUT

Every rank writes OUT/rank<i>.json. A rank that is not done after SECONDS writes the stacks of its threads to stderr
and ends with status 1, and torchrun ends the other one.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import faulthandler
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from tests.cpu.ranks import SECONDS, digest, end, join
from tests.cpu.small_grpo import small_grpo
from tests.cpu.training import Recorder, engine_of

STEPS = 2


def fsdp2(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """Shard by accelerate's own FSDP2, which it offers to ranks with GPUs only."""
    import trlpatch

    join()
    ranks_pass_for_gpus()
    policy = trlpatch.attach_engine(tiny.policy(checkpoint, r=3), tiny.engine(checkpoint))
    wrapped: dict[str, Any] = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
    if Version(version("transformers")) < Version("5"):
        wrapped["sync_module_states"] = False  # its default asks for a GPU
        os.environ["FSDP_VERSION"] = "2"  # as accelerate launch sets it; the config's is not read
    return policy, {"fsdp": "full_shard auto_wrap", "fsdp_config": wrapped}


def loaded(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """No call but that of `from_pretrained`; weights that vLLM keeps as they are, as on CUDA, so that ranks share."""
    import vllm._custom_ops

    from trlpatch import FastLanguageModel

    vllm._custom_ops._supports_onednn = False
    on_a_device_without_index()
    settings = {
        "share_weights": True,
        "max_seq_length": 256,
        "load_in_4bit": False,
        "max_lora_rank": 16,
        "enforce_eager": True,
    }
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), **settings)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, target_modules=list(tiny.TARGETS))
    return model, {"processing_class": tokenizer}


def tensor_parallel(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """One engine over both ranks, driven alike by each. One rank's count of versions is ahead of the other's."""
    import trlpatch
    from trlpatch.engine.adapter_sync import registry

    join()
    with_shared_memory_of_its_own()
    if os.environ["RANK"] == "1":
        registry.continue_from(7)
    engine = tiny.engine(checkpoint, tensor_parallel_size=2, distributed_executor_backend="external_launcher")
    return trlpatch.attach_engine(tiny.policy(checkpoint), engine), {"vllm_tensor_parallel_size": 2}


def on_a_device_without_index() -> None:
    """Let accelerate place a rank on `cpu`: a move to its `cpu:0` is a copy, unlike one from cuda:1 to cuda:1."""
    import torch
    from accelerate.state import PartialState

    construct = PartialState.__init__

    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        PartialState._shared_state["device"] = torch.device("cpu")

    PartialState.__init__ = constructed


def with_shared_memory_of_its_own() -> None:
    """Name the shared memory of vLLM's CPU ranks after this launch.

    Under external_launcher it has one name for all engines of a machine, and what a process that was killed has left
    makes every later one fail ("create shm in SHMManager failed", vLLM 0.28).
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    kind = vars(_CPUSHMDistributed)["make_group_name"]
    original = _CPUSHMDistributed.make_group_name if isinstance(kind, staticmethod) else kind

    def named(*args: Any) -> str:
        return f"{os.environ['TORCHELASTIC_RUN_ID']}-{original(*args).strip('/')}"  # of `env://`

    _CPUSHMDistributed.make_group_name = staticmethod(named) if isinstance(kind, staticmethod) else named


def ranks_pass_for_gpus() -> None:
    """Make accelerate take these ranks for some with a GPU each; torch finds out by itself that there is none."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    construct = AcceleratorState.__init__

    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        construct(self, *args, **kwargs)

    AcceleratorState.__init__ = constructed


def main(case: str, checkpoint: Path, out: Path) -> None:
    import trlpatch

    rank = int(os.environ["RANK"])
    trlpatch.PatchFastRL("grpo")
    policy, settings = globals()[case](checkpoint)
    given = {name: settings.pop(name) for name in ("processing_class",) if name in settings}
    trainer = small_grpo(policy, out / f"files{rank}", config={"max_steps": STEPS, **settings}, **given)
    engine = engine_of(trainer)
    recorder = Recorder(trainer, engine)
    trainer.train()
    recorder.close()
    control = without_the_adapter(trainer, engine)
    from trlpatch.engine.describe import describe_engines
    from trlpatch.policy.adapter import lora_view

    view = lora_view(trainer.model)
    found: dict[str, Any] = {
        "ranks": trainer.accelerator.num_processes,
        "rollouts": recorder.rollouts,
        "control": control,
        "sharded": None if view is None else view.weights("default").sharded,
        "weights": digest(trainer.model),
        "engines": describe_engines(),
        "seed": engine.llm_engine.vllm_config.model_config.seed,
    }
    (out / f"rank{rank}.json").write_text(json.dumps(found, indent=1))
    for left in Path("/dev/shm").glob(f"{os.environ['TORCHELASTIC_RUN_ID']}-*"):
        left.unlink(missing_ok=True)


def without_the_adapter(trainer: Any, engine: Any) -> list[float]:
    """The gap of what the engine says of the trained policy without its adapter; every rank calls it."""
    from vllm import SamplingParams

    from tests.cpu.small_grpo import gap
    from trlpatch.engine.state import state_of

    params = SamplingParams(max_tokens=8, logprobs=0, temperature=1.0, seed=0)
    with state_of(engine).as_asked():
        outputs = engine.generate(tiny.prompts(2), params, use_tqdm=False)
    return [gap(trainer.model, output) for output in outputs]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    end()
