"""Names and defaults of serving, for the command line to offer without importing what serves."""

from __future__ import annotations

VLLM, XLLAMACPP, LLAMA_CPP = "vllm", "xllamacpp", "llama-cpp-python"
BACKENDS = ("auto", VLLM, XLLAMACPP, LLAMA_CPP)

STARTUP_TIMEOUT = 600.0
"""Seconds until a server must have answered."""
