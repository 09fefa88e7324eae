"""Evaluation of checkpoints on held-out prompts."""
