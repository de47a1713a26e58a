"""What making writes and telling reads."""
