"""Use of trained models: loading, transcription of files and streams, publishing."""

from speechbrain_ext.inference.load import load_model

__all__ = ["load_model"]
