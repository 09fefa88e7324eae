"""Checks and measurements of one GPU; ``scripts/gpu_check.sh`` runs each module in turn."""
