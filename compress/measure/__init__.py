"""Quality, latency and memory of an artifact, reloaded in its runtime."""
