"""Detect a row's format and turn it into an example."""
