"""Recipes: strict schema, loading, validation and error messages. Never imports torch."""
