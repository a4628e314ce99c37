"""Captioned pictures in, training batches out."""
