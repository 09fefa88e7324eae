"""Rollouts, advantages and the online loop of PPO and GRPO."""
