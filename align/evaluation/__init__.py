"""Held-out evaluation: tasks, win rates, confidence intervals and reward-model cards."""
