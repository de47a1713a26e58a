"""Entropy-coded grids: steps, trellis, streams."""
