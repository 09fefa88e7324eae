"""Rollouts: engines, weight synchronization, sampled experience."""
