"""TRL's sources: which release is installed, and which of its files holds which trainer, without importing it."""
