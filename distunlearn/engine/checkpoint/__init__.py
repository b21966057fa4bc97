"""Checkpoints: their format, and saving beside the training."""
