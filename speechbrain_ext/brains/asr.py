"""The Brain of all architectures: joint CTC/attention training, search, error rates and checkpoints."""

import functools
import inspect
import itertools
import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import speechbrain.nnet.schedulers
import torch
import torch.nn.functional as F
import yaml
from speechbrain import Brain, Stage
from speechbrain.utils.checkpoints import (
    DEFAULT_LOAD_HOOKS,
    average_checkpoints,
    get_default_hook,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from speechbrain.utils.logger import get_logger
from speechbrain.utils.metric_stats import ErrorRateStats
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from speechbrain_ext.brains.finetuning import Frozen, check_scales, scaled_groups, scaled_rates
from speechbrain_ext.dataio.datasets import BatchesOfProcess
from speechbrain_ext.decoders import BEAM, GREEDY, JOINT, TRANSDUCER_BEAM, TRANSDUCER_GREEDY, search_name
from speechbrain_ext.decoders.alignment import greedy_tokens
from speechbrain_ext.lobes.augment import repeated
from speechbrain_ext.lobes.fusible import MaskedBatchNorm, reestimate_statistics, statistics_of
from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask, zero_padding
from speechbrain_ext.model_folder.write import check_normalization, model_parts
from speechbrain_ext.utils.distributed import gather_from_processes
from speechbrain_ext.utils.errors import UserError, UserRuntimeError, one_line
from speechbrain_ext.utils.machine import peak_memory_mib

logger = get_logger(__name__)


class Predictions(NamedTuple):
    """Output of the model for a batch."""

    frames: torch.Tensor
    """(B, T, D) encoder frames."""
    lengths: torch.Tensor
    """(B,) exact relative lengths of the frames."""
    ctc_logits: torch.Tensor
    """(B, T, V)."""
    seq_logits: torch.Tensor | None
    """(B, U, V) of the decoder; None without one."""
    transducer_loss: torch.Tensor | None = None
    """() of the transducer; None without one, or without targets."""


def disagreement(log_probs, lengths):
    """Divergence between the frames of two views, in nats per utterance: the loss of CR-CTC.

    Source: Yao et al. 2024, https://arxiv.org/abs/2410.05101, equation 5: each view moves towards the other, which is held fixed.

    Arguments
    ---------
    log_probs : torch.Tensor
        (2 B, T, V), the two views of a batch one after the other.
    lengths : torch.Tensor
        (2 B,) relative lengths.

    Returns
    -------
    torch.Tensor
        (), Kullback-Leibler divergences summed over valid frames, mean over both directions and the utterances.

    Example
    -------
    >>> view = torch.tensor([[[0.5, 0.5]]]).log()
    >>> disagreement(torch.cat((view, view)), torch.ones(2)).item()
    0.0
    """
    other = log_probs.detach().roll(len(log_probs) // 2, 0)
    divergence = F.kl_div(log_probs, other, reduction="none", log_target=True).sum(2, keepdim=True)
    mask = padding_mask(absolute_lengths(lengths, log_probs.shape[1]), log_probs.shape[1])
    return zero_padding(divergence, mask).sum() / len(log_probs)


class AsrModel(torch.nn.Module):
    """All modules with weights, in one forward. Checkpoints save it, and several GPUs need it as one module.

    Arguments
    ---------
    speech_encoder : SpeechEncoder
        From waveforms to frames, without a head.
    ctc_lin : torch.nn.Module
        The CTC head.
    seq_lin : torch.nn.Module, optional
        The decoder's output layer; left out if the encoder's TransformerASR has no decoder.
    transducer : Transducer, optional
        Predictor and joint network.
    transducer_cost : TransducerLoss, optional
        Its loss, which also has weights.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain_ext.asr import TransformerASR
    >>> from speechbrain_ext.lobes.features import InputNormalization
    >>> from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling
    >>> from speechbrain_ext.speech_encoder import SpeechEncoder
    >>> net = TransformerASR(30, 640, 32, 4, 2, 0, 64, encoder_module="conformer")
    >>> normalize = InputNormalization(norm_type="sentence")
    >>> encoder = SpeechEncoder(Fbank(n_mels=80), normalize, ConvolutionSubsampling(), net)
    >>> (prediction,) = AsrModel(encoder, torch.nn.Linear(32, 30))(torch.rand(2, 16000), torch.tensor([1.0, 0.5]))
    >>> prediction.ctc_logits.shape
    torch.Size([2, 26, 30])
    """

    def __init__(self, speech_encoder, ctc_lin, seq_lin=None, transducer=None, transducer_cost=None):
        super().__init__()
        self.speech_encoder = speech_encoder
        self.ctc_lin = ctc_lin
        self.seq_lin = seq_lin if hasattr(speech_encoder.transformer, "decoder") else None
        self.transducer = transducer
        self.transducer_cost = transducer_cost
        self.frozen = []  # modules inside that stay in evaluation mode

    def train(self, mode=True):
        """As in PyTorch, but frozen modules stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(
        self,
        signal,
        lens,
        targets=None,
        target_lens=None,
        *,
        is_features: bool = False,
        chunks: DynChunkTrainConfig | None = None,
        passes: tuple = (None,),
        augment=None,
        views: int = 1,
        pad_index: int = 0,
        step: int | None = None,
        **norm_keys,
    ):
        """Predict.

        Arguments
        ---------
        signal : torch.Tensor
            (B, N) samples, or (B, T, F) features of ``SpeechEncoder.features``.
        lens : torch.Tensor
            (B,) relative lengths.
        targets : torch.Tensor, optional
            (B, 1 + U) the token that begins a text, then the text, for the decoder or the transducer.
        target_lens : torch.Tensor, optional
            (B,) relative lengths of the texts, for the transducer.
        is_features : bool
            Whether the signal is features.
        chunks : DynChunkTrainConfig, optional
            The chunk setting, of features and encoder.
        passes : tuple of str
            The encoder's passes to run; None for the default.
        augment : callable, optional
            Turns normalised features and their lengths into augmented ones; it may add copies of the batch after it. If it has a
            true ``makes_views``, it takes the number of views too, as :class:`~speechbrain_ext.lobes.augment.SpecAugment` does.
        views : int
            Number of augmented views of the batch. The predictions are those of all views, one after the other.
        pad_index : int
            The token that pads ``targets``.
        step : int, optional
            Optimizer steps so far, for the warm-up of the transducer's loss.
        **norm_keys
            For the normalisation, such as ``epoch``.

        Returns
        -------
        list of Predictions
            One for each pass.
        """
        with statistics_of(self):
            encoder = self.speech_encoder
            feats, lens = (signal, lens) if is_features else encoder.features(signal, lens)
            feats = encoder.normalized(feats, lens, chunks, **norm_keys)
            if views > 1 and getattr(augment, "makes_views", False):
                feats, lens = augment(feats, lens, views)
            else:
                feats, lens = repeated(feats, views), repeated(lens, views)
                if augment is not None:
                    feats, lens = augment(feats, lens)
            if targets is not None:  # augmentations may have added copies of the batch too
                targets, target_lens = (repeated(each, len(feats) // len(targets)) for each in (targets, target_lens))
            predictions = []
            for pass_name in passes:
                frames, frame_lens = encoder.encode_features(feats, lens, chunks, pass_name)
                decoded = encoder.transformer.decode_targets(targets, frames, frame_lens, pad_index) if self.seq_lin else None
                seq_logits = None if decoded is None else self.seq_lin(decoded)
                transducer_loss = None
                if self.transducer is not None and targets is not None:
                    lengths, texts = absolute_lengths(frame_lens, frames.shape[1]), targets[:, 1:]
                    counts = absolute_lengths(target_lens, texts.shape[1])
                    transducer_loss = self.transducer_cost(self.transducer, frames, lengths, texts, counts, step)
                predictions.append(Predictions(frames, frame_lens, self.ctc_lin(frames), seq_logits, transducer_loss))
            return predictions


@register_checkpoint_hooks
class AsrBrain(Brain):
    """Trains an encoder with CTC: alone, jointly with a decoder with attention, or jointly with a transducer.

    Arguments
    ---------
    modules, opt_class, hparams, run_opts, checkpointer
        As in SpeechBrain; the keys of ``hparams`` are those of ``speechbrain_ext/training/hparams/ctc_attention.yaml``.

    Raises
    ------
    UserError
        If a model folder cannot keep the normalisation's statistics, heads or their weights do not fit together, or ``freeze`` or
        ``lr_scales`` is impossible.
    """

    passes = (None,)
    """The encoder's passes to validate and test; their names precede those of searches."""
    test_set = ""
    """The name of the test set for the log, if there are several."""

    def __init__(self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None):
        check_normalization(hparams["normalize"])
        check_heads(hparams)
        self.parts = model_parts(hparams)
        self.frozen = Frozen(hparams["model"], self.parts, hparams["freeze"], hparams["freeze_steps"])
        check_scales(hparams["lr_scales"], self.parts)
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        if self.debug and self.distributed_launch and checkpointer is not None:  # each process has made a folder
            place = [str(checkpointer.checkpoints_dir)]
            torch.distributed.broadcast_object_list(place, device=torch.device(self.device))
            checkpointer.checkpoints_dir = Path(place[0])
        if self.hparams.activation_checkpointing:
            self.hparams.speech_encoder.recompute_activations()
        # Totals of training, over all starts of the run
        self.audio_seconds = 0.0
        self.train_seconds = 0.0
        self.peak_memory_mib = 0.0
        self.unread = []  # losses on the device, with step and utterances, since the last optimizer step

    @property
    def selection(self):
        """The search whose error rate selects checkpoints: greedy search of the last pass."""
        search = GREEDY if self.hparams.transducer is None else TRANSDUCER_GREEDY
        return search_name(self.passes[-1], search)

    # ------------------------------------------------------------------ one batch

    def compute_forward(self, batch, stage):
        """Compute the predictions of each pass for a batch.

        Arguments
        ---------
        batch : PaddedBatch
            Items as :func:`speechbrain_ext.dataio.datasets.make_datasets` describes them.
        stage : speechbrain.Stage
            Only training augments.

        Returns
        -------
        dict
            :class:`Predictions` by pass.
        """
        batch = batch.to(self.device)
        hparams, augments = self.hparams, stage == Stage.TRAIN and self.optimizer_step >= self.hparams.augment_warmup
        signal, lens = batch.feats if hparams.cache_features else batch.sig
        if hparams.wav_augment and augments:
            signal, lens = hparams.wav_augment(signal, lens)
        self.frames = self.count_frames(batch, signal.shape[1], augments)
        passes = self.passes_of(stage)
        predictions = self.modules.model(
            signal,
            lens,
            batch.tokens_bos.data,
            batch.tokens.lengths,
            is_features=hparams.cache_features,
            chunks=self.draw_chunks(stage),
            passes=passes,
            augment=hparams.fea_augment if augments else None,
            views=2 if augments and hparams.consistency else 1,
            pad_index=hparams.blank_index,
            step=self.optimizer_step,
            epoch=hparams.epoch_counter.current,
        )
        return dict(zip(passes, predictions, strict=True))

    def count_frames(self, batch, length, augments):
        """Numbers of encoder frames (B,) of a batch of signals of this length. The host computes them, without waiting for the
        device. None if augmentation may have changed the relative lengths, or the batch decides."""
        hparams = self.hparams
        if getattr(hparams.subsampling, "is_cut", False):
            return None
        augmentations = [hparams.wav_augment, hparams.fea_augment] if augments else []
        if not all(getattr(each, "keeps_lengths", False) for each in augmentations if each):
            return None
        lens = batch.host_lengths["feats" if hparams.cache_features else "sig"]
        return hparams.speech_encoder.count_frames(absolute_lengths(lens, length), is_features=hparams.cache_features)

    def passes_of(self, stage):
        """The passes that run in a stage; by default all."""
        return self.passes

    def draw_chunks(self, stage):
        """The chunk setting for a batch, None for full context."""
        chunks = self.hparams.chunk_sampler(stage) if self.hparams.chunk_sampler else None
        if chunks is None:
            return None
        multiple = self.hparams.Transformer.encoder.chunk_multiple  # samplers draw any size
        return DynChunkTrainConfig(multiple * math.ceil(chunks.chunk_size / multiple), chunks.left_context_size)

    def compute_objectives(self, predictions, batch, stage):
        """The mean loss of the passes; outside of training also update the error rates."""
        losses = []
        for pass_name, prediction in predictions.items():
            with torch.autocast(self.device_type, enabled=False):  # in float32 in any precision
                ctc_log_probs = prediction.ctc_logits.float().log_softmax(-1)
                losses.append(self.loss(prediction, ctc_log_probs, batch))
            if stage != Stage.TRAIN:
                for search, texts in self.search(prediction, ctc_log_probs, stage).items():
                    name = search_name(pass_name, search, self.hparams.lm is not None)
                    rate = self.error_rates.setdefault(name, ErrorRateStats())
                    self.score(rate, batch, texts)
        return sum(losses) / len(losses)

    def loss(self, prediction, ctc_log_probs, batch):
        """The loss of one pass."""
        hparams, frames = self.hparams, ctc_log_probs.shape[1]
        views = len(ctc_log_probs) // len(batch.tokens.data)
        # With lengths on the device, the loss would wait for all earlier computations
        lengths = prediction.lengths if self.frames is None else repeated(self.frames / frames, views)
        tokens, token_lengths = (repeated(each, views) for each in (batch.tokens.data, batch.host_lengths["tokens"]))
        loss = hparams.ctc_cost(ctc_log_probs, tokens, lengths, token_lengths)
        if views > 1 and hparams.consistency:
            ramp = min(1.0, (self.optimizer_step - hparams.augment_warmup) / max(1, hparams.consistency_warmup))
            loss = loss + ramp * hparams.consistency * disagreement(ctc_log_probs, prediction.lengths)
        if prediction.transducer_loss is not None:
            return hparams.ctc_weight * loss + (1 - hparams.ctc_weight) * prediction.transducer_loss
        if prediction.seq_logits is None:
            return loss
        seq_log_probs = prediction.seq_logits.float().log_softmax(-1)
        seq_lengths = repeated(batch.tokens_eos.lengths, views)
        seq_loss = hparams.seq_cost(seq_log_probs, repeated(batch.tokens_eos.data, views), length=seq_lengths)
        return hparams.ctc_weight * loss + (1 - hparams.ctc_weight) * seq_loss

    def search(self, prediction, ctc_log_probs, stage):
        """Texts by the name of the search; slow searches run on test sets only."""
        hparams = self.hparams
        texts = {GREEDY: self.decode(greedy_tokens(ctc_log_probs, prediction.lengths, hparams.blank_index))}
        if stage == Stage.TEST and hparams.ctc_search:
            texts[BEAM] = hparams.ctc_search(ctc_log_probs, prediction.lengths)
        if stage == Stage.TEST and prediction.seq_logits is not None and hparams.test_search:
            texts[JOINT] = self.decode(hparams.test_search(prediction.frames.float(), prediction.lengths)[0])
        if hparams.transducer is not None:
            beams = {TRANSDUCER_GREEDY: 1}
            if stage == Stage.TEST and hparams.transducer_search.beam_size > 1:
                beams[TRANSDUCER_BEAM] = hparams.transducer_search.beam_size
            for name, beam_size in beams.items():
                best = hparams.transducer_search.hypotheses(prediction.frames, prediction.lengths, beam_size)
                texts[name] = self.decode([hypothesis.tokens for hypothesis in best])
        return texts

    def score(self, error_rate, batch, hypotheses):
        """Add the texts of a batch to an error rate."""
        words, references = ([text.split() for text in texts] for texts in (hypotheses, batch.wrd))
        error_rate.append(batch.id, words, references)

    def decode(self, hypotheses):
        """Texts of lists of token ids."""
        return [self.hparams.tokenizer.decode_ids(ids) for ids in hypotheses]

    # ------------------------------------------------------------------ training

    def _train_loader_specifics(self, dataset, loader_kwargs):
        # SpeechBrain's wrapper would drop or repeat batches if their number is not a multiple of the processes
        world = torch.distributed.get_world_size() if self.distributed_launch else 1
        self.train_sampler = BatchesOfProcess(loader_kwargs["batch_sampler"], self.rank if world > 1 else 0, world)
        return {**loader_kwargs, "batch_sampler": self.train_sampler}

    def fit_batch(self, batch):
        """As in SpeechBrain, but the last batches of an epoch make a step even if they are few, with their mean gradient.

        Raises
        ------
        UserRuntimeError
            If a GPU has too little memory.
        """
        batches, factor = len(self.train_sampler), self.grad_accumulation_factor
        if self.debug:
            batches = min(batches, self.debug_batches)
        should_step = self.step % factor == 0 or self.step == batches
        together = min(factor, batches - (self.step - 1) // factor * factor)  # batches of this optimizer step
        self.on_fit_batch_start(batch, should_step)
        try:
            with self.no_sync(not should_step):
                with self.training_ctx:
                    outputs = self.compute_forward(batch, Stage.TRAIN)
                    loss = self.compute_objectives(outputs, batch, Stage.TRAIN)
                self.scaler.scale(loss / together).backward()
            self.unread.append((loss.detach(), self.step, batch.id))
            read = self.optimizers_step() if should_step else []
        except torch.OutOfMemoryError as error:
            remedy = (
                "lower max_batch_length of train_batch_sampler, set activation_checkpointing to True, or give --precision bf16"
            )
            raise self.too_little_memory(batch, error, remedy) from error
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        return read

    def evaluate_batch(self, batch, stage):
        """As in SpeechBrain.

        Raises
        ------
        UserRuntimeError
            If a GPU has too little memory.
        """
        try:
            return super().evaluate_batch(batch, stage)
        except torch.OutOfMemoryError as error:
            remedy = "lower max_batch_length of eval_batch_sampler; the run then continues from its last checkpoint"
            raise self.too_little_memory(batch, error, remedy) from error

    def too_little_memory(self, batch, error, remedy):
        """The error for a batch that does not fit into the memory of the device."""
        return UserRuntimeError(
            f"There is too little memory on {self.device} for a batch of {len(batch.id)} utterances and "
            f"{float(batch.duration.sum()):.0f} s ({one_line(error, 100)}); {remedy}."
        )

    def update_average(self, loss, avg_loss):
        """As in SpeechBrain, but training uses the losses that :meth:`fit_batch` has read, as (loss, step)."""
        if not isinstance(loss, list):
            return super().update_average(loss, avg_loss)
        for value, step in loss:
            if math.isfinite(value):
                avg_loss += (value - avg_loss) / step
        return avg_loss

    def _wrap_distributed(self):
        """As in SpeechBrain, but gradients are views of the buffers to send, without a copy."""
        if not self.distributed_launch:
            return
        devices = None if self.distributed_backend == "gloo" else [self.device]
        # Of convolutions with one input channel, whose dimension of size 1 may have any stride
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with self.frozen.lifted():
            for name, module in self.modules.items():
                if any(parameter.requires_grad for parameter in module.parameters()):
                    self.modules[name] = DistributedDataParallel(
                        SyncBatchNorm.convert_sync_batchnorm(module),
                        device_ids=devices,
                        find_unused_parameters=self.find_unused_parameters or self.frozen.steps > 0,
                        gradient_as_bucket_view=True,
                    )

    def _compile(self):
        """Compile subsampling and encoder for ``--compile``, in place, once for all lengths."""
        if not self.compile:
            return
        encoder = self.hparams.speech_encoder
        for part in (encoder.subsampling, encoder.transformer.encoder):
            part.compile(dynamic=True, mode=self.compile_mode, fullgraph=self.compile_using_fullgraph)

    def init_optimizers(self):
        """As in SpeechBrain, with the groups of ``lr_scales``. Optimizers that have a fused form use it, unless hparams choose
        another way: one launch on a GPU, and on a CPU a third of the time."""
        opt_class, scales = self.opt_class, self.hparams.lr_scales
        given, make = {"fused", "foreach", "differentiable"} & getattr(opt_class, "keywords", {}).keys(), opt_class
        if self.device_type in ("cpu", "cuda") and "fused" in inspect.signature(opt_class).parameters and not given:
            make = functools.partial(opt_class, fused=True)
        self.opt_class = (lambda parameters: make(scaled_groups(parameters, scales, self.parts))) if scales else make
        super().init_optimizers()
        self.opt_class = opt_class
        # PyTorch keeps these in checkpoints, with the state
        self.optimizer_settings = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]

    def on_fit_start(self):
        """As in SpeechBrain, but without a further epoch if the last one reached the limit of optimizer steps.

        A checkpoint holds settings of schedule and optimizer; those of the hparams replace them, because they may have changed.
        """
        schedule = self.hparams.lr_annealing
        names = inspect.signature(type(schedule)).parameters
        # SpeechBrain's schedules that are told the step have no state: all that they load is made from their arguments
        loader = get_default_hook(schedule, DEFAULT_LOAD_HOOKS)
        is_stateless = self.tells_step and getattr(loader, "__module__", "") == speechbrain.nnet.schedulers.__name__
        settings = {name: value for name, value in vars(schedule).items() if is_stateless or name in names}
        super().on_fit_start()
        vars(schedule).update(settings)
        for group, settings in zip(self.optimizer.param_groups, self.optimizer_settings, strict=True):
            group.update(settings)
        if self.step == 0 and self._optimizer_step_limit_exceeded:
            self.hparams.epoch_counter.current = self.hparams.epoch_counter.limit

    @functools.cached_property
    def tells_step(self):
        """Whether the learning rate schedule is told the number of the step; other schedules count the steps themselves."""
        return "num_updates" in inspect.signature(self.hparams.lr_annealing).parameters

    def set_learning_rate(self):
        """Set the learning rate of the coming step.

        Raises
        ------
        UserRuntimeError
            If the schedule has ended: past its last step, linear ones go below zero.
        """
        step = self.optimizer_step + 1
        self.hparams.lr_annealing(self.optimizer, *([step] if self.tells_step else []))
        if self.optimizer.param_groups[0]["lr"] < 0:
            raise UserRuntimeError(
                f"The learning rate schedule ended before step {step}; end the training there too: give "
                f"--optimizer_step_limit {step - 1}, or a longer schedule."
            )

    def optimizers_step(self):
        """As in SpeechBrain, with one wait for the device: losses since the last step and the gradients' norm come together.

        The learning rate is set before the step: otherwise the first step would have the peak rate.

        Returns
        -------
        list
            (loss, step of the epoch) of the batches that made the gradients.

        Raises
        ------
        UserRuntimeError
            If more losses of the epoch were not finite than ``nonfinite_patience`` allows.
        """
        self.set_learning_rate()
        optimizers, norms = self.freeze_optimizers(self.optimizers_dict).values(), []
        limit = math.inf if self.max_grad_norm <= 0 else self.max_grad_norm  # as in SpeechBrain, 0 and less do not clip
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, limit).to(self.device))
        *losses, norm = torch.stack([*(loss.float() for loss, *_ in self.unread), torch.stack(norms).float().sum()]).tolist()
        read = [(loss, step, ids) for loss, (_, step, ids) in zip(losses, self.unread, strict=True)]
        self.unread = []
        for loss, step, ids in read:
            if not math.isfinite(loss):
                self.count_nonfinite(loss, step, ids)
        if not math.isfinite(norm) and all(math.isfinite(loss) for loss in losses) and not self.scaler.is_enabled():
            logger.warning("The gradients are not finite at step %d of the epoch; the step is left out.", self.step)
        # With float16 the scaler leaves such steps out itself
        if self.scaler.is_enabled() or math.isfinite(norm) or not self.skip_nonfinite_grads:
            for optimizer in optimizers:
                with scaled_rates(optimizer):
                    self.scaler.step(optimizer)
            self.scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.optimizer_step += 1
        return [(loss, step) for loss, step, _ in read]

    def count_nonfinite(self, loss, step, ids):
        """Count losses that are not finite, and stop with the names of the utterances if there are too many."""
        self.nonfinite_count += 1
        message = f"The loss is {loss} at step {step} of the epoch, for the utterances {', '.join(ids)}"
        if self.nonfinite_count > self.nonfinite_patience:
            raise UserRuntimeError(
                f"{message}; this happened {self.nonfinite_count} times in the epoch, more often than nonfinite_patience allows: "
                "check these utterances, lower lr, or use bf16 or fp32 in place of fp16."
            )
        logger.warning("%s; the step is left out.", message, main_process_only=False)

    def on_fit_batch_start(self, batch, should_step):
        """Unfreeze parts that were frozen for some steps."""
        super().on_fit_batch_start(batch, should_step)
        if self.frozen.update(self.optimizer_step):
            self.modules.train()

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Measure audio and time."""
        world = torch.distributed.get_world_size() if self.distributed_launch else 1
        now = time.perf_counter()
        seconds, longest = float(batch.duration.sum()), float(batch.duration.max())  # on the host
        self.audio_seconds += world * seconds
        self.epoch_seconds += seconds
        self.padded_seconds += len(batch.duration) * longest
        self.train_seconds += now - self.clock
        self.clock = now

    def _should_save_intra_epoch_ckpt(self, *args):
        # Not between two batches of one optimizer step: the gradients so far are in no checkpoint.
        is_between = self.step % self.grad_accumulation_factor == 0
        return is_between and self.step < len(self.train_sampler) and super()._should_save_intra_epoch_ckpt(*args)

    # ------------------------------------------------------------------ stages

    def on_stage_start(self, stage, epoch=None):
        """Start the clock, and new error rates."""
        self.clock = time.perf_counter()
        self.epoch_seconds = self.padded_seconds = 0.0
        self.error_rates = {}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log; after validation save a checkpoint."""
        if stage == Stage.TRAIN:
            peak = max(self.peak_memory_mib, peak_memory_mib(str(self.device)))
            measured = torch.tensor([stage_loss, self.epoch_seconds, self.padded_seconds, peak], dtype=torch.float64)
            (of_all,) = gather_from_processes(measured.to(self.device) if self.distributed_launch else measured)
            loss, seconds, padded, _ = of_all.mean(0).tolist()
            self.train_stats, self.peak_memory_mib = {"loss": loss}, of_all[:, 3].max().item()
            if padded:  # since the last start
                self.train_stats["padding %"] = 100 * (1 - seconds / padded)
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
            if self.test_set:  # loggers such as W&B keep one value of each name
                stats = {f"{name} of {self.test_set}": value for name, value in stats.items()}
            self.hparams.train_logger.log_stats({"epoch": self.hparams.epoch_counter.current}, test_stats=stats)

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load no checkpoint: the model is tested as it is."""

    # ------------------------------------------------------------------ the trained model

    def make_final(self, batches):
        """Turn the trained model into the one to test and save: the average of the best checkpoints.

        Arguments
        ---------
        batches : iterable
            Training batches, for BatchNorm statistics: averaged weights need new statistics.

        Returns
        -------
        dict
            By the name of a model folder: its weights (:func:`speechbrain_ext.model_folder.write.model_parts`), and whether they
            are fused.

        Raises
        ------
        UserError
            If there is no checkpoint of a finished epoch.
        """
        best = self.checkpointer.find_checkpoints(min_key="WER", max_num_checkpoints=self.hparams.average_checkpoints)
        if not best:
            raise UserError(f"There is no checkpoint of a finished epoch in {self.checkpointer.checkpoints_dir}; train first.")
        # Everything except the weights comes from the last epoch, also the statistics of the features
        self.checkpointer.recover_if_possible(ckpt_predicate=lambda checkpoint: checkpoint.meta["end-of-epoch"])
        model = self.hparams.model
        self.frozen.update(self.optimizer_step)
        latest, frozen = model.speech_encoder.normalize.state_dict(), self.frozen.state()  # averaging would round them
        model.load_state_dict(average_checkpoints(best, "model"))
        model.speech_encoder.normalize.load_state_dict(latest)
        self.parts.load_state_dict(frozen, strict=False)
        if any(isinstance(part, MaskedBatchNorm) for part in model.modules()):
            batches = itertools.islice(batches, self.hparams.statistics_batches)
            forward = functools.partial(self.compute_forward, stage=Stage.VALID)
            reestimate_statistics(self.modules, batches, forward, model.frozen)
        return {"pretrained": (model_parts(vars(self.hparams)), False)}

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


def check_heads(hparams):
    """Refuse heads that do not fit together, and a weight that would leave one of them untrained.

    Arguments
    ---------
    hparams : dict
        Built training hparams.

    Raises
    ------
    UserError
        If there are a decoder and a transducer, a part of the transducer is missing, or CTC or transducer has no weight.
    """
    parts = ("transducer", "transducer_cost", "transducer_search")
    missing = [key for key in parts if hparams[key] is None]
    if len(missing) == len(parts):
        return
    if missing:
        raise UserError(f"{missing[0]} is null, and a transducer needs {', '.join(parts)}; extend transducer.yaml.")
    if hparams["num_decoder_layers"]:
        raise UserError(
            f"There is a transducer, and num_decoder_layers is {hparams['num_decoder_layers']}; give 0, as it takes no decoder."
        )
    if not 0 < hparams["ctc_weight"] < 1:
        raise UserError(
            f"ctc_weight is {hparams['ctc_weight']}; give more than 0, as CTC gives the times of words, and less than 1, as the "
            "transducer would learn nothing with 1."
        )
