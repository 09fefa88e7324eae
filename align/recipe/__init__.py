"""Recipes: strict schema, loading, DeepSpeed configuration. Never imports torch."""
