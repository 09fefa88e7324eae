"""Losses and gradients of align beside those of TRL's trainers."""
