"""The policy in training: its LoRA adapter, what changed in it, what vLLM could serve of it.

Knows torch and PEFT; neither vLLM nor TRL.
"""
