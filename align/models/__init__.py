"""Models: loading, heads, packed attention and log-probabilities."""
