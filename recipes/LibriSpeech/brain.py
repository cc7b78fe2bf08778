"""What the Brains of all architectures share: joint CTC/attention training, search, error rates and checkpoints."""

import itertools
import math
import time

import torch
import yaml
from speechbrain import Brain, Stage
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.utils.checkpoints import average_checkpoints, mark_as_loader, mark_as_saver, register_checkpoint_hooks
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from speechbrain.utils.logger import get_logger
from speechbrain.utils.metric_stats import ErrorRateStats

from recipes.LibriSpeech.results import peak_memory_mib
from speechbrain_ext.lobes.features import extract_features, normalize_features
from speechbrain_ext.lobes.fusible import MaskedBatchNorm, reestimate_statistics

logger = get_logger(__name__)

GREEDY, BEAM, JOINT = "ctc_greedy", "ctc_beam", "joint_beam"


@register_checkpoint_hooks
class AsrBrain(Brain):
    """Trains an encoder with CTC, and with a decoder jointly with attention; without one (num_decoder_layers 0) by CTC only.

    Arguments
    ---------
    modules, opt_class, hparams, run_opts, checkpointer
        As in SpeechBrain; the keys of ``hparams`` are those of ``recipes/LibriSpeech/hparams/ctc_attention.yaml``.

    Attributes
    ----------
    train_batches : callable
        Iterates over the training batches, for BatchNorm statistics; set before testing.
    """

    fused = False
    """Whether the final model is fused for inference."""
    answer = ""
    """Goes before the names of searches, where a model gives several answers."""
    selection = GREEDY
    """The search whose error rate selects checkpoints."""

    def __init__(self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None):
        if not hparams["num_decoder_layers"]:  # nothing would feed seq_lin
            unused = hparams["seq_lin"]
            modules = {name: module for name, module in modules.items() if module is not unused}
            hparams["model"] = torch.nn.ModuleList(module for module in hparams["model"] if module is not unused)
            checkpointer.add_recoverable("model", hparams["model"])
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        self.is_final = False
        # Of training, over all starts of the run
        self.audio_seconds = 0.0
        self.train_seconds = 0.0
        self.peak_memory_mib = 0.0

    # ------------------------------------------------------------------ one batch

    def compute_forward(self, batch, stage):
        """From a batch to logits.

        Arguments
        ---------
        batch : PaddedBatch
            Of items as :func:`recipes.LibriSpeech.data.make_datasets` describes them.
        stage : speechbrain.Stage
            Training augments.

        Returns
        -------
        tuple
            Encoder frames (B, T, D), their exact relative lengths (B,), CTC logits (B, T, V), and the decoder's logits
            (B, U, V) or None.
        """
        batch = batch.to(self.device)
        feats, lens = self.features(batch, stage)  # (B, T, F)
        chunks = self.draw_chunks(stage)
        size = None if chunks is None else self.hparams.subsampling.factor * chunks.chunk_size
        feats = normalize_features(self.modules.normalize, feats, lens, size, epoch=self.hparams.epoch_counter.current)
        if self.hparams.fea_augment and self.augments(stage):
            feats, lens = self.hparams.fea_augment(feats, lens)
        return self.forward_features(feats, lens, chunks, batch, stage)

    def forward_features(self, feats, lens, chunks, batch, stage):
        """From normalised features (B, T, F) with relative lengths (B,) to what :meth:`compute_forward` returns."""
        x, lens = self.modules.subsampling(feats, lens)
        enc, dec = self.modules.Transformer(
            x, batch.tokens_bos.data, lens, pad_idx=self.hparams.blank_index, dynchunktrain_config=chunks
        )
        return enc, lens, self.modules.ctc_lin(enc), None if dec is None else self.modules.seq_lin(dec)

    def draw_chunks(self, stage):
        """The chunk setting for a batch, None for full context."""
        chunks = self.hparams.chunk_sampler(stage) if self.hparams.chunk_sampler else None
        if chunks is None:
            return None
        multiple = self.hparams.Transformer.encoder.chunk_multiple  # samplers draw any size
        return DynChunkTrainConfig(multiple * math.ceil(chunks.chunk_size / multiple), chunks.left_context_size)

    def augments(self, stage):
        """Whether it is time to augment."""
        return stage == Stage.TRAIN and self.optimizer_step >= self.hparams.augment_warmup

    def features(self, batch, stage):
        """Features (B, T, F) of a batch with exact relative lengths (B,): those that came with it, or of its waveforms."""
        if self.hparams.cache_features:
            return batch.feats
        wavs, lens = batch.sig
        if self.hparams.wav_augment and self.augments(stage):
            wavs, lens = self.hparams.wav_augment(wavs, lens)
        return extract_features(self.hparams.compute_features, wavs, lens)

    def compute_objectives(self, predictions, batch, stage):
        """The loss, in float32 whatever the precision; outside of training the error rates, too."""
        enc, lens, ctc_logits, seq_logits = predictions
        hparams = self.hparams
        with torch.autocast(self.device_type, enabled=False):
            ctc_log_probs = ctc_logits.float().log_softmax(-1)
            loss = hparams.ctc_cost(ctc_log_probs, batch.tokens.data, lens, batch.tokens.lengths)
            if seq_logits is not None:
                seq_log_probs = seq_logits.float().log_softmax(-1)
                seq_loss = hparams.seq_cost(seq_log_probs, batch.tokens_eos.data, length=batch.tokens_eos.lengths)
                loss = hparams.ctc_weight * loss + (1 - hparams.ctc_weight) * seq_loss
        if stage != Stage.TRAIN:
            texts = {GREEDY: self.decode(ctc_greedy_decode(ctc_log_probs, lens, hparams.blank_index))}
            if stage == Stage.TEST and hparams.ctc_search:
                texts[BEAM] = hparams.ctc_search(ctc_log_probs, lens)
            if stage == Stage.TEST and seq_logits is not None:
                texts[JOINT] = self.decode(hparams.test_search(enc.float(), lens)[0])
            for search, hypotheses in texts.items():
                self.score(self.error_rates.setdefault(self.answer + search, ErrorRateStats()), batch, hypotheses)
        return loss

    def score(self, error_rate, batch, hypotheses):
        """Add the texts of a batch to an error rate."""
        words, references = ([text.split() for text in texts] for texts in (hypotheses, batch.wrd))
        error_rate.append(batch.id, words, references)

    def decode(self, hypotheses):
        """Texts of lists of token ids."""
        return [self.hparams.tokenizer.decode_ids(ids) for ids in hypotheses]

    # ------------------------------------------------------------------ training

    def on_fit_start(self):
        """As in SpeechBrain, and no further epoch where the last one ended with the limit of optimizer steps."""
        super().on_fit_start()
        if self.step == 0 and self._optimizer_step_limit_exceeded:
            self.hparams.epoch_counter.current = self.hparams.epoch_counter.limit

    def on_fit_batch_start(self, batch, should_step):
        """Keep what a message would name."""
        self.batch_ids = batch.id

    def check_loss_isfinite(self, loss):
        """Count losses that are not finite, and stop with the names of the utterances where there are too many."""
        if torch.isfinite(loss):
            return
        self.nonfinite_count += 1
        message = f"The loss is {loss.item()} at step {self.step} of the epoch, for the utterances {', '.join(self.batch_ids)}"
        if self.nonfinite_count > self.nonfinite_patience:
            raise FloatingPointError(
                f"{message}; it was so {self.nonfinite_count} times in this epoch, more often than nonfinite_patience allows: "
                "look at these utterances, lower lr, or use bf16 or fp32 in place of fp16."
            )
        logger.warning("%s; the step is left out.", message)

    def optimizers_step(self):
        """As in SpeechBrain, with the learning rate set before: otherwise the first step would have the peak one."""
        self.hparams.lr_annealing(self.optimizer)
        super().optimizers_step()

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Measure."""
        world = torch.distributed.get_world_size() if self.distributed_launch else 1
        now = time.perf_counter()
        seconds, longest = float(sum(batch.duration)), float(max(batch.duration))
        self.audio_seconds += world * seconds
        self.epoch_seconds += seconds
        self.padded_seconds += len(batch.duration) * longest
        self.train_seconds += now - self.clock
        self.clock = now

    def _should_save_intra_epoch_ckpt(self, *args):
        # Not between two batches of one optimizer step: the gradients so far are in no checkpoint.
        return self.step % self.grad_accumulation_factor == 0 and super()._should_save_intra_epoch_ckpt(*args)

    # ------------------------------------------------------------------ stages

    def on_stage_start(self, stage, epoch=None):
        """Start the clock, and new error rates."""
        self.clock = time.perf_counter()
        self.epoch_seconds = self.padded_seconds = 0.0
        self.error_rates = {}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log; after validation save a checkpoint."""
        if stage == Stage.TRAIN:
            self.peak_memory_mib = max(self.peak_memory_mib, peak_memory_mib(str(self.device)))
            self.train_stats = {"loss": float(stage_loss)}
            if self.padded_seconds:  # since the last start, of this process
                self.train_stats["padding %"] = 100 * (1 - self.epoch_seconds / self.padded_seconds)
            return
        stats = {"loss": float(stage_loss)}
        stats |= {f"WER {search}": float(rate.summarize("error_rate")) for search, rate in self.error_rates.items()}
        if stage == Stage.VALID:
            meta = {"epoch": epoch, "steps": self.optimizer_step, "lr": self.optimizer.param_groups[0]["lr"]}
            self.hparams.train_logger.log_stats(meta, self.train_stats, stats)
            self.checkpointer.save_and_keep_only(
                meta={"WER": stats[f"WER {self.selection}"], "epoch": epoch},
                min_keys=["WER"],
                keep_recent=False,
                num_to_keep=self.hparams.average_checkpoints,
            )
        else:
            self.hparams.train_logger.log_stats({"epoch": self.hparams.epoch_counter.current}, test_stats=stats)

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Before the first test set, make the model that is tested and kept."""
        if not self.is_final:
            self.load_average()
            self.finalize()
            self.is_final = True

    def load_average(self):
        """Load the average of the best checkpoints, with all else of the last epoch. The checkpoints stay as they are.

        The average of BatchNorm statistics is not that of the averaged weights: they are taken again, over training batches
        without augmentation.

        Raises
        ------
        FileNotFoundError
            If there is no checkpoint of a finished epoch.
        """
        best = self.checkpointer.find_checkpoints(min_key="WER", max_num_checkpoints=self.hparams.average_checkpoints)
        if not best:
            raise FileNotFoundError(
                f"There is no checkpoint of a finished epoch in {self.checkpointer.checkpoints_dir}; train first."
            )
        self.checkpointer.recover_if_possible(ckpt_predicate=lambda checkpoint: checkpoint.meta["end-of-epoch"])
        self.hparams.model.load_state_dict(average_checkpoints(best, "model"))
        if any(isinstance(part, MaskedBatchNorm) for part in self.hparams.model.modules()):
            batches = itertools.islice(self.train_batches(), self.hparams.statistics_batches)
            reestimate_statistics(self.modules, batches, lambda batch: self.compute_forward(batch, Stage.VALID))

    def finalize(self):
        """Change the averaged model for inference; nothing by default."""

    # ------------------------------------------------------------------ checkpoints

    @mark_as_saver
    def _save(self, path):
        names = ("step", "optimizer_step", "avg_train_loss", "audio_seconds", "train_seconds", "peak_memory_mib")
        path.write_text(yaml.safe_dump({name: getattr(self, name) for name in names}), encoding="utf-8")

    @mark_as_loader
    def _recover(self, path, end_of_epoch):
        del end_of_epoch  # the step is 0 then
        for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            setattr(self, name, value)
