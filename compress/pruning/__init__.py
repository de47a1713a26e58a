"""Structured pruning: what goes together, what it is worth, and the smaller model without it."""
