"""The stages of a recipe; each runs in its own process."""
