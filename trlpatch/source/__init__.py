"""Which TRL is installed, and which of its files holds which trainer, without importing TRL."""
