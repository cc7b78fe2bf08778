"""Small helpers that every room uses: errors, files, text, the machine."""
