"""Graphs for ONNX Runtime, built from the very codes that the torch artifact holds."""
