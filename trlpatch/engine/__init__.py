"""Everything that knows vLLM: rollout backends, building an engine, adapter sync, sleep, sharing its weights.

Nothing here knows TRL. vLLM, torch and peft are imported inside functions, so importing the package costs
nothing.
"""
