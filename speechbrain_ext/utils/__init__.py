"""Small helpers for the whole package: errors, files, text, the machine."""
