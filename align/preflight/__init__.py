"""Checks on real rows and the real model, made before a stage takes its first step."""
