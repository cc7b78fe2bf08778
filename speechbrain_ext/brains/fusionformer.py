"""Training of the FusionFormer."""

import copy

from speechbrain import Stage
from speechbrain.utils.logger import get_logger
from speechbrain.utils.metric_stats import ErrorRateStats

from speechbrain_ext.brains.asr import AsrBrain
from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask
from speechbrain_ext.model_folder.write import model_parts
from speechbrain_ext.registry import encoder_keys
from speechbrain_ext.utils.errors import UserError

logger = get_logger(__name__)


class FusionFormerBrain(AsrBrain):
    """Trains a FusionFormer, tests the fused model, and compares it with the unfused one.

    Raises
    ------
    UserError
        If the encoder or the subsampling has nothing to fold.
    """

    def __init__(self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None):
        if (hparams["encoder_kwargs"] or {}).get("fused"):
            raise UserError("encoder_kwargs has fused: True, which builds no BatchNorm to train; leave it out.")
        if not hasattr(hparams["subsampling"], "fuse_"):
            raise UserError(
                f"subsampling is {type(hparams['subsampling']).__name__}, which has nothing to fold; give FusibleSubsampling."
            )
        if "fused" not in encoder_keys(hparams["encoder"]):
            raise UserError(f"encoder is {hparams['encoder']}, which cannot be built fused; give fusionformer, or another Brain.")
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        self.unfused = None

    def make_final(self, batches):
        """Fuse the averaged model, and also keep it unfused."""
        (parts, _), hparams = super().make_final(batches)["pretrained"], self.hparams
        self.unfused = copy.deepcopy(hparams.model).eval()
        unfused = copy.deepcopy(parts)
        hparams.subsampling.fuse_()
        hparams.Transformer.encoder.fuse_()
        return {"pretrained": (model_parts(vars(hparams)), True), "pretrained_unfused": (unfused, False)}

    def compute_forward(self, batch, stage):
        """As in AsrBrain. The test also searches greedily with the unfused model."""
        predictions = super().compute_forward(batch, stage)
        if stage != Stage.TEST or self.unfused is None:
            return predictions
        signal, lens = batch.feats if self.hparams.cache_features else batch.sig
        chunks = self.draw_chunks(stage)  # a test has the same chunks in all batches
        (unfused,) = self.unfused(signal, lens, is_features=self.hparams.cache_features, chunks=chunks)
        log_probs = unfused.ctc_logits.float().log_softmax(-1)
        difference = (predictions[None].ctc_logits.float().softmax(-1) - log_probs.exp()).abs().amax(2)
        padded = padding_mask(absolute_lengths(unfused.lengths, difference.shape[1]), difference.shape[1])
        self.difference = max(self.difference, difference.masked_fill(padded, 0.0).max().item())
        self.score(self.unfused_errors, batch, self.search(unfused, log_probs, Stage.VALID)[self.selection])
        return predictions

    def on_stage_start(self, stage, epoch=None):
        """Start new error rates."""
        super().on_stage_start(stage, epoch)
        self.unfused_errors = ErrorRateStats()
        self.difference = 0.0

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """After a test, check that the fused model gives the same output as the unfused one.

        Raises
        ------
        RuntimeError
            If a probability differs by more than 0.01, or the number of errors by more than a word in a thousand, which rounding
            may change. In reduced precision, where rounding changes more, there is only a warning.
        """
        super().on_stage_end(stage, stage_loss, epoch)
        if stage != Stage.TEST or self.unfused is None:
            return
        fused, unfused = (errors.summarize() for errors in (self.error_rates[self.selection], self.unfused_errors))
        rates = f"fused and unfused: WER {fused['WER']:.2f} and {unfused['WER']:.2f} %"
        logger.info("Greedy search, %s; no probability differs by more than %.1e", rates, self.difference)
        turned = abs(fused["num_edits"] - unfused["num_edits"])
        if turned > max(1, fused["num_scored_tokens"] / 1000) or not self.difference < 0.01:
            message = f"Greedy search, {rates}, with probabilities that differ by up to {self.difference:.1e}"
            if self.eval_precision == "fp32":
                raise RuntimeError(f"{message}: fusing went wrong; the checkpoints of the training are unchanged.")
            logger.warning("%s; in fp32 (--eval_precision fp32) they should be the same.", message)
