"""Searches, their scorers and language models, and the alignment of words."""
