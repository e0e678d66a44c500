"""Messages that people meet on the way, of vLLM, TRL, torch and trlpatch: why, and what to do.

docs/troubleshooting.md is this table; `trlpatch doctor --error TEXT` looks a message or a log up in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from trlpatch.runtime.compat.removed import EVERY


class KnownError(NamedTuple):
    """One message.

    Attributes:
        message: as people see it and search for it.
        pattern: regular expression that finds it in a log, whatever case it is in.
        cause: why it is raised.
        solution: what to do.
    """

    message: str
    pattern: str
    cause: str
    solution: str


KNOWN_ERRORS: tuple[KnownError, ...] = (
    KnownError(
        "Please install vLLM before enabling fast_inference",
        r"install vLLM before enabling|No module named '?vllm|vllm not found|needs vllm|vllm is not installed",
        "vLLM is not installed; there are no wheels of it for macOS and Windows.",
        "The extra `vllm`, on Linux with an NVIDIA GPU; `trlpatch doctor` has the command for this installation. "
        "`fast_inference=False` trains without it, anywhere.",
    ),
    KnownError(
        "set fast_inference=True when doing load_in_fp8",
        r"fast_inference ?= ?True`? when doing `?load_in_fp8|load_in_fp8=True needs",
        "Weights in fp8 are the engine's, so there has to be one.",
        "Leave `fast_inference` at True beside `load_in_fp8=True`, or drop `load_in_fp8`.",
    ),
    KnownError(
        "DGX Spark detected",
        r"DGX Spark|GB10",
        "vLLM was broken on DGX Spark (GB10) as of January 2026.",
        "Nothing: transformers generates there. `TRLPATCH_VLLM_ON_GB10=1` tries vLLM all the same.",
    ),
    KnownError(
        "CUDA out of memory",
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory",
        "Model, optimizer and engine together need more than the device has.",
        "Colocated with training: `gpu_memory_utilization` 0.3 to 0.5, a shorter `max_seq_length`, "
        "`load_in_4bit=True`, `enable_sleep_mode=True`. A vLLM server on a device of its own: "
        "`vllm_gpu_memory_utilization` 0.8 or 0.7.",
    ),
    KnownError(
        "vLLM initialization failed",
        r"vLLM initiali[sz]ation failed|Engine core initialization failed|building the vLLM engine .* failed",
        "vLLM does not fit the torch, transformers or driver beside it, or the device is too small.",
        "Read the first error above this one in the log and look that up; `trlpatch check` says whether the versions "
        "ran together; `pip install --upgrade vllm`.",
    ),
    KnownError(
        "Free memory on device is less than desired GPU memory utilization",
        r"less than desired (GPU|CPU) memory utilization",
        "`gpu_memory_utilization` is the share of the whole device, also of what other processes hold.",
        "End the others (`nvidia-smi`), or lower `gpu_memory_utilization`.",
    ),
    KnownError(
        "No available memory for the cache blocks",
        r"No available memory for the cache blocks|larger than the available KV cache memory",
        "After the weights nothing is left of `gpu_memory_utilization` for a KV cache of `max_seq_length`.",
        "Raise `gpu_memory_utilization`, or lower `max_seq_length`.",
    ),
    KnownError(
        "vLLM health check timeout",
        r"health check time(d )?out|VLLM_HEALTH_CHECK_TIMEOUT_S|Engine init(ialization)? timed out",
        "A large model takes long to load and compile when an engine starts for the first time.",
        "Wait up to 20 minutes for the first start; raise VLLM_HEALTH_CHECK_TIMEOUT_S (600 s), for engines on Ray "
        "actors TRLPATCH_RAY_INIT_TIMEOUT (1200 s). Later starts find the compiled code in VLLM_CACHE_ROOT.",
    ),
    KnownError(
        "Prefix caching is currently not supported for v0",
        r"prefix caching .*v0|VLLM_USE_V1\W{0,4}0",
        "VLLM_USE_V1=0 asks for vLLM's old engine.",
        "Unset it, or set `VLLM_USE_V1=1`; else disable prefix caching.",
    ),
    KnownError(
        "Expandable segments are not compatible with memory pool",
        r"expandable segments are not compatible|makes torch's segments expandable",
        "Sleep mode cannot unmap segments that torch may expand.",
        "Take `expandable_segments:True` out of PYTORCH_CUDA_ALLOC_CONF, or do without `enable_sleep_mode`.",
    ),
    KnownError(
        "LoRA rank is greater than max_lora_rank",
        r"is greater than max_lora_rank|RankAboveEngine|LoRA rank \d+ is",
        "The engine's LoRA buffers were built for a smaller rank than the adapter's `r`.",
        "Build it with `max_lora_rank` of at least `r` (from_pretrained: default 64).",
    ),
    KnownError(
        "AnchorDrift",
        r"AnchorDrift|is where trlpatch expects",
        "The installed TRL is not the text that its release had: newer than every tested one, or edited.",
        "`trlpatch check` names the place; `trlpatch diff`; a tested TRL (`pip install trl==...`) works meanwhile.",
    ),
    KnownError(
        "EngineMismatch",
        r"EngineMismatch",
        "Engine and model are not the same policy: another checkpoint, vocabulary or dtype.",
        "Build both from the same directory. One whose config.json ties the embeddings while its lm_head.weight has "
        "other values is two models (transformers warns): set tie_word_embeddings there to what was trained. "
        "`attach_engine(model, llm, check=False)` if you know better.",
    ),
    KnownError(
        "'CausalLMOutputWithPast' object has no attribute 'last_hidden_state'",
        r"has no attribute 'last_hidden_state'",
        "PEFT's `get_peft_model` has wrapped a PEFT model; TRL 1.15 and newer, stock too, finds no hidden states.",
        "`model = model.unload()` before `get_peft_model`, or train the adapter that is there.",
    ),
    KnownError(
        "'Parameter' object has no attribute 'weight_loader'",
        r"'Parameter' object has no attribute 'weight_loader'",
        "TRL pushes weights into an engine whose CPU backend has packed them for its own kernels.",
        'Leave `PatchFastRL(adapter="off")` out: with vLLM 0.25 and newer trlpatch has the weights loaded anew.',
    ),
    KnownError(
        "No CUDA GPUs are available",
        r"No CUDA GPUs are available|torch finds no CUDA device|Found no NVIDIA driver|Torch not compiled with CUDA",
        "torch sees no GPU: none there, hidden by CUDA_VISIBLE_DEVICES, a CPU build of torch, or no driver.",
        "`trlpatch doctor` says which.",
    ),
    KnownError(
        "CUDA driver version is insufficient",
        r"driver version is insufficient|NVIDIA driver on your system is too old|PTX was compiled with an unsupported",
        "torch was built for a newer CUDA than the driver runs.",
        "Update the driver, or install an older torch with the vLLM that goes with it.",
    ),
    KnownError(
        "unexpected keyword argument 'warmup_ratio' / 'max_prompt_length'",
        rf"unexpected keyword argument '({'|'.join(sorted({one.name for one in EVERY}))})'",
        "TRL 1.x and transformers 5 took arguments away that older notebooks pass.",
        'docs/compat.md names what to write instead, and `PatchFastRL(compat="on")`, which accepts most of them.',
    ),
    KnownError(
        "The server socket has failed to listen on any local network address",
        r"server socket has failed to listen|EADDRINUSE|Address already in use",
        "vLLM and torch pick a free port and listen on it later: another process has it by then. Or two runs have one "
        "MASTER_PORT.",
        "Start again. Runs that start together: give each a `VLLM_PORT` and a `MASTER_PORT` of its own, below 32768, "
        "where Linux gives ports to nobody (`VLLM_PORT=20000 MASTER_PORT=20050`, then 20100 and 20150).",
    ),
    KnownError(
        "Cannot re-initialize CUDA in forked subprocess",
        r"Cannot re-initialize CUDA in forked subprocess",
        "CUDA was started before vLLM forked its worker.",
        "Keep the worker in this process, as from_pretrained does: VLLM_ENABLE_V1_MULTIPROCESSING=0 before vllm is "
        "imported.",
    ),
    KnownError(
        "ClusterTimeout",
        r"ClusterTimeout|Ray did not answer in [\d.]+ s",
        "Ray did not start, answer or end in TRLPATCH_RAY_CLUSTER_TIMEOUT (300 s): its GCS, on the head's host, hangs "
        "or cannot be reached.",
        "`ray status` there, and gcs_server.out in Ray's session folder. A head that is started anew (`ray stop`, "
        "`ray start --head`), and RAY_ADDRESS that names it; too slow: `timeouts=Timeouts(cluster=600)`.",
    ),
    KnownError(
        "EngineInitFailed",
        r"EngineInitFailed|starting \d+ rollout engine\(s\) on Ray actors",
        "A rollout engine did not come up in its Ray actor: vLLM's reason is behind it, or TRLPATCH_RAY_INIT_TIMEOUT "
        "(1200 s) went by.",
        "What vLLM says is in this table; out of memory: `gpu_memory_utilization` 0.8 or 0.7 of `create_engines`; too "
        "slow: `timeouts=Timeouts(init=2400)`.",
    ),
    KnownError(
        "EngineHung",
        r"EngineHung|had ended no step after|answered nothing, not even `health`",
        "An engine on a Ray actor had requests and ended no step, or its process answered nothing, for "
        "TRLPATCH_RAY_HEALTH_TIMEOUT (600 s). It was killed and replaced, its prompts were asked again.",
        "Nothing once. Again and again: its log (Ray's session folder), `nvidia-smi`, NCCL between the GPUs of one "
        "engine; where steps really take so long, a longer timeout.",
    ),
    KnownError(
        "RolloutFailed",
        r"RolloutFailed|were given to two rollout engines",
        "The same prompts ended two engines, one after the other; both errors are in the message.",
        "Look at these prompts (length, images) and at the memory left: `gpu_memory_utilization`, `max_model_len`, "
        "`max_num_seqs` of `create_engines`. Resume from the last checkpoint.",
    ),
    KnownError(
        "NoEngineLeft",
        r"NoEngineLeft|none of \d+ rollout engines serves",
        "Every engine on a Ray actor was lost, and none came up again in three starts.",
        "`ray status` says what the cluster has; the first error of the log why the first one was lost.",
    ),
    KnownError(
        "degraded: 1 of 2 rollout engines serve",
        r"degraded: \d+ of \d+ rollout engines",
        "An engine on a Ray actor was lost; another one is being started in its place, and rollouts go on meanwhile.",
        "Nothing: `all 2 rollout engines serve again` follows. docs/ray-faults.md has each kind of loss.",
    ),
    KnownError(
        "ActorDiedError: The actor died unexpectedly before finishing this task",
        r"ActorDiedError|The actor died unexpectedly|ActorUnavailableError",
        "The process of a Ray actor ended, or its node cannot be reached: killed (often by the kernel for memory), "
        "crashed, or taken away with its node.",
        "An engine's is replaced. Elsewhere: `dmesg` and `ray status` on its node, and host memory: engines of one "
        "node load the checkpoint at the same time.",
    ),
    KnownError(
        "The current node timed out during startup",
        r"current node timed out during startup|metrics_agent_port",
        "On a busy machine Ray gives its own agent too little time to start, and ends.",
        "Try again, or start the cluster before (`ray start --head`) and set RAY_ADDRESS=auto.",
    ),
)


def look_up(text: str) -> Iterator[KnownError]:
    """Yield the known errors that `text`, a message or a whole log, contains."""
    yield from (known for known in KNOWN_ERRORS if re.search(known.pattern, text, re.IGNORECASE))


def as_markdown() -> str:
    """Return the table as it stands in docs/troubleshooting.md."""
    rows = (f"| `{known.message}` | {known.cause} | {known.solution} |" for known in KNOWN_ERRORS)
    return "\n".join(("| message | cause | solution |", "|---|---|---|", *rows)) + "\n"
