"""What a model is for: to continue text, to answer it, to fill in masked tokens, or to embed text."""
