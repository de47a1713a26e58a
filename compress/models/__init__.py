"""Models of `transformers`: read, made, run, and taken apart."""
