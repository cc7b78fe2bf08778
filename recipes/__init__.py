"""Recipes: a package for each corpus."""
