"""The stages a recipe can name; each runs in its own process."""
