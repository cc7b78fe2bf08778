"""Training of the HyperConformer."""

from recipes.LibriSpeech.brain import AsrBrain


class HyperConformerBrain(AsrBrain):
    """Trains a HyperConformer; all that it needs is what all architectures share."""
