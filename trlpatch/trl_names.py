"""Attribute and class names of TRL that patched text and hooks must agree on. Imports nothing."""

ENGINE_ATTRIBUTES = ("llm", "vllm_engine")
"""Attributes of trainers and of `VLLMGeneration` that hold an in-process engine; `vllm_engine` is GOLD's below 1.0."""

SYNC_METHODS = ("sync_weights", "_move_model_to_vllm")
"""Methods that push the policy's weights: of `VLLMGeneration` (TRL 0.28 and newer), of trainers below."""

LEFT_ALONE_TRAINERS = ("NashMDTrainer", "XPOTrainer")
"""Subclasses of OnlineDPOTrainer (up to TRL 1.13) that inherit its engine and do not roll out on it."""

# TRL 0.18 to 1.13: both override `training_step` and call transformers' `generate` in it, whatever `use_vllm` says.
LEFT_ALONE_REASON = "TRL generates with transformers for them, not on the engine they inherit"

CORRECTION = "vllm_importance_sampling_correction"
"""The field of configs (TRL 0.23 and newer) that weights completions by probability of trainer over that of engine."""

CORRECTION_LEFT_OUT = "_trlpatch_correction_left_out"
"""In `vars(config)`, with compat="on", while CORRECTION has the value that upstream gave it and nobody set another."""
