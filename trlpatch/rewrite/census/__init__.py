"""Census: every use of a vLLM engine in TRL's source has to be of a known form, in patched files and in all others.

Patches look for what they know. The census looks at the rest: what names an engine and is neither what patches make of
TRL's code nor declared harmless is drift.
"""
