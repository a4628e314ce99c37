"""Backbones: one file a family of vision-language models."""
