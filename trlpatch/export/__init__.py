"""Export: merged weights, adapters and GGUF files, of a model in training, a checkpoint or an adapter directory."""
