"""Which versions of TRL, vLLM, transformers, torch and peft ran together, which are known not to, and why."""
