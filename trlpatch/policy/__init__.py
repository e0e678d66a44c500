"""The policy in training: its LoRA adapter, change detection, base weights, what a LoRA request can carry of it.

Knows torch and PEFT; neither vLLM nor TRL.
"""
