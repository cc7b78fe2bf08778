"""Audio files, manifests, tokenizer and datasets."""
