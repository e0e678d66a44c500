"""The functions that patched TRL code calls, and nothing else. See docs/architecture.md for who calls which.

Importing this imports no torch, vllm, peft, transformers or trl: it happens while TRL's own modules are
imported.
"""

from trlpatch.hooks.adopt_engine import engine, generation
from trlpatch.hooks.configure import configure
from trlpatch.hooks.lora_request import lora_request
from trlpatch.hooks.sampling import normalize_sampling, sampling_params
from trlpatch.hooks.sleep import reload_weights, sleep, wake_up
from trlpatch.hooks.sync import hand_over

__all__ = [
    "configure",
    "engine",
    "generation",
    "hand_over",
    "lora_request",
    "normalize_sampling",
    "reload_weights",
    "sampling_params",
    "sleep",
    "wake_up",
]
