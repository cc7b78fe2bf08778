"""Training of the FusionFormer."""

import copy

import torch
from speechbrain import Stage
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.utils.logger import get_logger
from speechbrain.utils.metric_stats import ErrorRateStats

from recipes.LibriSpeech.brain import GREEDY, AsrBrain
from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask

logger = get_logger(__name__)


class FusionFormerBrain(AsrBrain):
    """Trains a FusionFormer; tests it fused, and holds the unfused model against it.

    Raises
    ------
    ValueError
        If the encoder or the front end has nothing to fold.
    """

    fused = True

    def __init__(self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None):
        if (hparams["encoder_kwargs"] or {}).get("fused"):
            raise ValueError("encoder_kwargs has fused: True, which builds no BatchNorm to train; leave it out.")
        if not hasattr(hparams["subsampling"], "fuse_"):
            raise ValueError(
                f"subsampling is {type(hparams['subsampling']).__name__}, which has nothing to fold; give FusibleSubsampling."
            )
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)

    def finalize(self):
        """Fold the BatchNorms into the weights, and keep the model as it was beside it."""
        self.unfused = copy.deepcopy(self.hparams.model).eval()
        self.hparams.subsampling.fuse_()
        self.hparams.Transformer.encoder.fuse_()

    def forward_features(self, feats, lens, chunks, batch, stage):
        """As for all architectures; in the test also greedy search with the unfused model."""
        predictions = super().forward_features(feats, lens, chunks, batch, stage)
        if stage != Stage.TEST:
            return predictions
        subsampling, transformer, *_, ctc_lin = self.unfused
        with torch.no_grad():
            x, lens = subsampling(feats, lens)
            enc = transformer.encode(x, lens, dynchunktrain_config=chunks)
            log_probs = ctc_lin(enc).float().log_softmax(-1)
        difference = (predictions[2].float().softmax(-1) - log_probs.exp()).abs().amax(2)
        padded = padding_mask(absolute_lengths(lens, difference.shape[1]), difference.shape[1])
        self.difference = max(self.difference, difference.masked_fill(padded, 0.0).max().item())
        texts = self.decode(ctc_greedy_decode(log_probs, lens, self.hparams.blank_index))
        self.score(self.unfused_errors, batch, texts)
        return predictions

    def on_stage_start(self, stage, epoch=None):
        """Start new error rates."""
        super().on_stage_start(stage, epoch)
        self.unfused_errors = ErrorRateStats()
        self.difference = 0.0

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """After a test, the fused model must give the unfused one's answers.

        Raises
        ------
        RuntimeError
            If it does not: if a probability differs by more than a hundredth, or the error rate by more than a word in a
            thousand, which rounding may turn. In reduced precision, where rounding does more, a warning says so.
        """
        super().on_stage_end(stage, stage_loss, epoch)
        if stage != Stage.TEST:
            return
        fused, unfused = (errors.summarize() for errors in (self.error_rates[GREEDY], self.unfused_errors))
        rates = f"fused and unfused: WER {fused['WER']:.2f} and {unfused['WER']:.2f} %"
        logger.info("Greedy search, %s; no probability differs by more than %.1e", rates, self.difference)
        turned = abs(fused["num_edits"] - unfused["num_edits"])
        if turned > max(1, fused["num_scored_tokens"] / 1000) or not self.difference < 0.01:
            message = f"Greedy search, {rates}, with probabilities that differ by up to {self.difference:.1e}"
            if self.eval_precision == "fp32":
                raise RuntimeError(f"{message}: fusing went wrong; the checkpoints of the training are as they were.")
            logger.warning("%s; in fp32 (--eval_precision fp32) they should be the same.", message)
