"""vLLM in this process: what an engine can do, its sleep state, and how a LoRA adapter is handed to it.

Nothing here knows TRL. vLLM, torch and peft are imported inside functions, so importing the package costs
nothing.
"""
