"""Training of the Practical Conformer, or of any two encoders in a cascade."""

import random

from speechbrain import Stage

from recipes.LibriSpeech.brain import GREEDY, AsrBrain
from speechbrain_ext.encoders.cascade import PASSES, CascadedEncoder
from speechbrain_ext.lobes.performer import redraw_features


class PracticalConformerBrain(AsrBrain):
    """Trains a cascade: draws for each batch the pass that answers, and validates and tests both.

    Batches of the first pass train the first stage alone, those of the second pass both. The draws, and those of random features,
    depend on the step only: they are the same in all processes, and in a run that was interrupted.

    Raises
    ------
    ValueError
        If the encoder is no cascade, or ``first_pass_prob`` or ``redraw_interval`` is impossible.
    """

    selection = f"second_pass_{GREEDY}"

    def __init__(self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None):
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        self.encoder = self.hparams.Transformer.encoder
        if not isinstance(self.encoder, CascadedEncoder):
            raise ValueError(f"This recipe trains a cascade of two encoders; encoder is '{self.hparams.encoder}', not 'cascade'.")
        share, interval = self.hparams.first_pass_prob, self.hparams.redraw_interval
        if not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(
                f"first_pass_prob is {share!r}; give 0 or more and less than 1, where the second pass would learn nothing."
            )
        if not isinstance(interval, int) or interval < 0:
            raise ValueError(f"redraw_interval is {interval!r}; give a whole number of optimizer steps, or 0 for never.")
        self.find_unused_parameters = True  # batches of the first pass give the second stage no gradient
        self.draw = 0

    def on_fit_batch_start(self, batch, should_step):
        """Draw the pass and, from time to time, the random features."""
        super().on_fit_batch_start(batch, should_step)
        number = f"{self.hparams.seed}/{self.hparams.epoch_counter.current}/{self.step}"
        self.drawn = "first" if random.Random(number).random() < self.hparams.first_pass_prob else "second"
        if self.hparams.redraw_interval and self.draw != 1 + self.optimizer_step // self.hparams.redraw_interval:
            self.draw = 1 + self.optimizer_step // self.hparams.redraw_interval
            redraw_features(self.encoder, self.draw)

    def draw_chunks(self, stage):
        """The chunk setting for a batch, one that both passes can take whichever is drawn."""
        self.encoder.answer = "second"
        return super().draw_chunks(stage)

    def forward_features(self, feats, lens, chunks, batch, stage):
        """What the base class gives, by the name of the pass."""
        predictions = {}
        for answer in (self.drawn,) if stage == Stage.TRAIN else PASSES:
            self.encoder.answer = answer
            predictions[answer] = super().forward_features(feats, lens, chunks, batch, stage)
        return predictions

    def compute_objectives(self, predictions, batch, stage):
        """The mean over the passes that ran."""
        losses = []
        for answer, prediction in predictions.items():
            self.answer = f"{answer}_pass_"
            losses.append(super().compute_objectives(prediction, batch, stage))
        return sum(losses) / len(losses)
