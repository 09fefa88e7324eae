"""Rollouts: engines, weight sync, sampled experience."""
