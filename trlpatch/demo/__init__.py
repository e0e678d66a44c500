"""`trlpatch demo`: GRPO with LoRA on a tiny model made on the spot, in about a minute on two CPU cores."""
