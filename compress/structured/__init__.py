"""Heads, neurons, widths, blocks and tokens taken out whole."""
