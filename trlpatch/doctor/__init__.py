"""`trlpatch doctor`: what of this machine and its packages keeps training on vLLM from working, and what to do."""
