"""Training: one Brain for all architectures, and a subclass where an architecture trains in its own way."""
