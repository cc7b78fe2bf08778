"""LibriSpeech, corpora in its layout, and the embedded mini corpus."""
