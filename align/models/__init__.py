"""Loading models, heads, packed attention and log-probabilities."""
