"""Foundations every layer may use: errors, types, logging, artefacts, checkpoints."""
