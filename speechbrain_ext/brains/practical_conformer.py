"""Training of the Practical Conformer, or of any two encoders in a cascade."""

import random

from speechbrain import Stage

from speechbrain_ext.brains.asr import AsrBrain
from speechbrain_ext.lobes.performer import redraw_features
from speechbrain_ext.registry import passes_of
from speechbrain_ext.utils.errors import UserError


class PracticalConformerBrain(AsrBrain):
    """Trains a cascade: draws the pass of each batch at random, and validates and tests both passes.

    Batches of the first pass train only the first stage, batches of the second pass train both. The draws of passes and of random
    features depend only on the step: they are the same in all processes, and in a resumed run.

    Raises
    ------
    UserError
        If the encoder is not a cascade, or ``first_pass_prob`` or ``redraw_interval`` is impossible.
    """

    def __init__(self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None):
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        self.encoder = self.hparams.Transformer.encoder
        self.passes = passes_of(self.encoder)
        if len(self.passes) != 2:
            raise UserError(f"This recipe trains an encoder of two passes, such as cascade; encoder is '{self.hparams.encoder}'.")
        share, interval = self.hparams.first_pass_prob, self.hparams.redraw_interval
        if not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise UserError(
                f"first_pass_prob is {share!r}; give 0 or more and less than 1; with 1 the second pass would learn nothing."
            )
        if not isinstance(interval, int) or interval < 0:
            raise UserError(f"redraw_interval is {interval!r}; give a whole number of optimizer steps, or 0 for never.")
        self.find_unused_parameters = True  # batches of the first pass give the second stage no gradient
        self.draw = 0

    def on_fit_batch_start(self, batch, should_step):
        """Draw the pass and, every ``redraw_interval`` steps, the random features."""
        super().on_fit_batch_start(batch, should_step)
        number = f"{self.hparams.seed}/{self.hparams.epoch_counter.current}/{self.step}"
        self.drawn = self.passes[random.Random(number).random() >= self.hparams.first_pass_prob]
        if self.hparams.redraw_interval and self.draw != 1 + self.optimizer_step // self.hparams.redraw_interval:
            self.draw = 1 + self.optimizer_step // self.hparams.redraw_interval
            redraw_features(self.encoder, self.draw)

    def passes_of(self, stage):
        """The drawn pass in training, otherwise all."""
        return (self.drawn,) if stage == Stage.TRAIN else self.passes
