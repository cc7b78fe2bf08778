"""Training: one Brain for all architectures, and subclasses for architectures that train differently."""
