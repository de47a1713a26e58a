"""The walk through a model, block by block, on calibration text; and what is seen on the way."""
