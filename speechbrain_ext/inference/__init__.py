"""Trained models at work: loading, reading audio, transcribing."""

from speechbrain_ext.inference.pretrained import load_model

__all__ = ["load_model"]
