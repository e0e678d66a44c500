"""Real training runs, one per process: any trainer that rolls out on vLLM, on any TRL release, patched or stock."""
