"""Checks on the actual rows and model that run before the first step of a stage."""
