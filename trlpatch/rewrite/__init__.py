"""Rewriter, pure text to text: which patches apply to a TRL source file, and the file with them applied.

Imports neither trl, torch nor vllm. Nothing here is imported on a warm start.
"""
