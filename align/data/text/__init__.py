"""Text statistics: n-grams, near duplicates, contamination."""
