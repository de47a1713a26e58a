"""What making writes and telling reads: an artifact, a run, measured lines; and how to measure them."""
