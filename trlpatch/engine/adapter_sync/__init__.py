"""Adapter sync: the ways of getting a LoRA adapter into an engine. Its backend chooses one per engine."""
