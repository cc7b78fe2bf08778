"""Training of the Conformer."""

from recipes.LibriSpeech.brain import AsrBrain


class ConformerBrain(AsrBrain):
    """Trains a Conformer; all that it needs is what all architectures share."""
