"""Training of the FusionFormer."""

import copy

import torch
from speechbrain import Stage
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.utils.logger import get_logger
from speechbrain.utils.metric_stats import ErrorRateStats

from recipes.LibriSpeech.brain import GREEDY, AsrBrain

logger = get_logger(__name__)


class FusionFormerBrain(AsrBrain):
    """Trains a FusionFormer; tests it fused, and holds the unfused model against it."""

    fused = True

    def finalize(self):
        """Fold the BatchNorms into the weights, and keep the model as it was beside it."""
        self.unfused = copy.deepcopy(self.hparams.model).eval()
        self.hparams.subsampling.fuse_()
        self.hparams.Transformer.encoder.fuse_()

    def forward_features(self, feats, lens, batch, stage):
        """As for all architectures; in the test also greedy search with the unfused model."""
        if stage == Stage.TEST:
            subsampling, transformer, *_, ctc_lin = self.unfused
            with torch.no_grad():
                x, frame_lens = subsampling(feats, lens)
                enc = transformer.encode(x, frame_lens, dynchunktrain_config=self.draw_chunks(stage))
                log_probs = ctc_lin(enc).float().log_softmax(-1)
            texts = self.decode(ctc_greedy_decode(log_probs, frame_lens, self.hparams.blank_index))
            self.score(self.unfused_errors, batch, texts)
        return super().forward_features(feats, lens, batch, stage)

    def on_stage_start(self, stage, epoch=None):
        """Start new error rates."""
        super().on_stage_start(stage, epoch)
        self.unfused_errors = ErrorRateStats()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """After a test, the fused model's error rate must be the unfused one's.

        Raises
        ------
        RuntimeError
            If it is not: rounding may turn a word in a thousand, an error in fusing turns many. In reduced precision, where
            rounding turns more, a warning says so.
        """
        super().on_stage_end(stage, stage_loss, epoch)
        if stage != Stage.TEST:
            return
        fused, unfused = (errors.summarize() for errors in (self.error_rates[GREEDY], self.unfused_errors))
        rates = f"fused and unfused: WER {fused['WER']:.2f} and {unfused['WER']:.2f} %"
        logger.info("Greedy search, %s", rates)
        if abs(fused["num_edits"] - unfused["num_edits"]) > max(3, fused["num_scored_tokens"] / 1000):
            if self.eval_precision == "fp32":
                raise RuntimeError(f"Greedy search, {rates}: fusing went wrong.")
            logger.warning("Greedy search, %s; in fp32 (--eval_precision fp32) they should be the same.", rates)
