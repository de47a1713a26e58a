"""Pure tensor functions: tensors in, tensors out, no modules."""
