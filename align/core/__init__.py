"""Foundations for all layers: errors, types, logging, artifacts, checkpoints."""
