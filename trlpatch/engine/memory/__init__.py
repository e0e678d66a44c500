"""Device memory of an engine: sleep and wake, KV-cache-only sleep, headroom for the weights."""
