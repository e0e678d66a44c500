"""The functions that patched TRL code calls, and nothing else. See docs/architecture.md for who calls which.

Importing this imports no torch, vllm, peft, transformers or trl: it happens while TRL's own modules are
imported.
"""

from trlpatch.hooks.adapter_sync import hand_over
from trlpatch.hooks.adopt_engine import engine
from trlpatch.hooks.chat_template import chat_template
from trlpatch.hooks.configure import configure
from trlpatch.hooks.image_prompts import image_prompts, same_prompts
from trlpatch.hooks.logps import (
    deferred_logits,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from trlpatch.hooks.lora_request import lora_request
from trlpatch.hooks.old_logps import (
    importance_sampling_ratio,
    keep_sampling_logps,
    old_logps,
    old_sequence_logps,
)
from trlpatch.hooks.repairs import (
    given,
    guided_decoding_field,
    guided_decoding_params,
    http_adapter,
    is_package_available,
    messages_only,
    nested_gather,
    prompt_limit,
    sampling_limit,
    seed_worker,
    top_k,
    use_apex,
    use_cache,
    vllm_tokenizer,
    warnings_issued,
    weight_sender,
)
from trlpatch.hooks.rollout_func import rollout_func, rollout_func_server
from trlpatch.hooks.sampling import generation, normalize_sampling, sampling_params
from trlpatch.hooks.sleep import reload_weights, sleep, wake_up

__all__ = [
    "chat_template",
    "configure",
    "deferred_logits",
    "engine",
    "entropy_from_logits",
    "generation",
    "given",
    "guided_decoding_field",
    "guided_decoding_params",
    "hand_over",
    "http_adapter",
    "image_prompts",
    "importance_sampling_ratio",
    "is_package_available",
    "keep_sampling_logps",
    "lora_request",
    "messages_only",
    "nested_gather",
    "normalize_sampling",
    "old_logps",
    "old_sequence_logps",
    "prompt_limit",
    "reload_weights",
    "rollout_func",
    "rollout_func_server",
    "same_prompts",
    "sampling_limit",
    "sampling_params",
    "seed_worker",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "sleep",
    "top_k",
    "use_apex",
    "use_cache",
    "vllm_tokenizer",
    "wake_up",
    "warnings_issued",
    "weight_sender",
]
