"""The one optimisation loop, what it minimises, and with what."""
