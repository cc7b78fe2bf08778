"""Recipes: what belongs to one corpus, a package each."""
