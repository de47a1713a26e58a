"""What is on disk: an artifact written, read, counted."""
