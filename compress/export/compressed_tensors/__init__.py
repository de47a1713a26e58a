"""Checkpoints for transformers and vLLM."""
