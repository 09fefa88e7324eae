"""Held-out tasks, win rates and intervals."""
