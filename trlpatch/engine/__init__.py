"""vLLM in this process: building an engine, sharing its weights, its sleep, and handing it a LoRA adapter.

Nothing here knows TRL. vLLM, torch and peft are imported inside functions, so importing the package costs
nothing.
"""
