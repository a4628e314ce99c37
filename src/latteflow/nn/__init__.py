"""Building blocks: they take numbers and tensors, never a config."""
