"""Trained models at work: loading, reading audio, transcribing."""
