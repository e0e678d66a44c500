"""FastLanguageModel: a transformers model and a vLLM engine in one process, ready for a TRL trainer."""
