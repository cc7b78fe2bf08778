"""Efficient speech encoders for SpeechBrain: padding-exact, streaming, of any length."""

__version__ = "0.2.0"
