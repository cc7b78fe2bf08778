"""Manifests, datasets, batches, and options of data loaders."""

import copy
import math
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from speechbrain.dataio.batch import PaddedBatch, PaddedData
from speechbrain.dataio.dataset import DynamicItemDataset, add_dynamic_item, set_output_keys
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_ext.dataio.audio import load_audio
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.utils.errors import UserError, is_whole, one_line, runs_foreign_code
from speechbrain_ext.utils.files import read_csv, write_csv

logger = get_logger(__name__)

MANIFEST_FIELDS = ("ID", "duration", "wav", "spk_id", "wrd")
"""Columns of a manifest: id, seconds, path of the audio, speaker, transcript."""
SEGMENT_FIELDS = ("start", "stop", "channel")
"""Optional columns for a segment or a channel of a recording: the first sample and the one after the last, at the recording's
rate, and the channel, counted from 0. Empty means the whole recording or all channels."""
MIXED = "mixed-"
"""Prefix of the ids of utterances that are mixed in."""
LARGE = 2**16
"""A tensor with more numbers is copied to a device by itself."""


def write_manifest(path, rows):
    """Write a manifest, completely or not at all. It has those columns of :data:`SEGMENT_FIELDS` that any row has a value for.

    Arguments
    ---------
    path : str or os.PathLike
        The file to write.
    rows : list of dict
        Values by column; other columns are left out.
    """
    used = [field for field in SEGMENT_FIELDS if any(row.get(field) not in ("", None) for row in rows)]
    fields = [*MANIFEST_FIELDS[:3], *used, *MANIFEST_FIELDS[3:]]
    write_csv(path, fields, [[row.get(field) for field in fields] for row in rows])


def merge_manifests(paths, path, mixed=None):
    """Write the rows of several manifests as one.

    Arguments
    ---------
    paths : list of str or os.PathLike
        CSV files in the format of :func:`read_manifest`.
    path : str or os.PathLike
        The file to write.
    mixed : str or os.PathLike, optional
        A further manifest. Its ids get the prefix :data:`MIXED`, because the other manifests may hold the same utterances.
    """
    rows = [row for part in paths for row in read_manifest(part)]
    if mixed is not None:
        rows += [row | {"ID": MIXED + row["ID"]} for row in read_manifest(mixed)]
    write_manifest(path, rows)


def read_manifest(path):
    """The rows of a manifest.

    Arguments
    ---------
    path : str or os.PathLike
        A CSV file with the columns :data:`MANIFEST_FIELDS`; it may have others.

    Returns
    -------
    list of dict
        Values by column, as text.

    Raises
    ------
    UserError
        If the file is missing, is not CSV in UTF-8, or lacks a column, or if a line has too many or too few values.
    """
    expected = f"the corpus's prepare function writes it, with the columns {', '.join(MANIFEST_FIELDS)}."
    if not os.path.isfile(path):
        raise UserError(f"There is no manifest {path}; {expected}")
    rows = read_csv(path)
    missing = [field for field in MANIFEST_FIELDS if rows and field not in rows[0]]
    if missing:
        raise UserError(f"The manifest {path} has no column {', '.join(missing)}; {expected}")
    for row in rows:
        if None in row.values():
            begin = next(iter(row.values()))
            raise UserError(f"The manifest {path} has a line with too few values, which begins with {begin!r:.60}; {expected}")
    return rows


def make_datasets(hparams, manifests):
    """Make datasets whose items are utterances with waveforms or features, and tokens.

    Arguments
    ---------
    hparams : dict
        The hparams of the run, with a trained tokenizer.
    manifests : dict
        CSV files by name.

    Returns
    -------
    dict
        A DynamicItemDataset for each manifest. Items have ``id``, ``duration`` (seconds), ``wrd`` (the transcript), ``tokens``,
        ``tokens_bos`` and ``tokens_eos``, and either ``sig`` (samples) or, with ``cache_features``, ``feats``.

    Raises
    ------
    UserError
        If both ``wav_augment`` and ``cache_features`` are set, or a manifest has no utterances, an id twice, an empty transcript,
        a segment without samples, or a value that is not a number.
    """
    if hparams["cache_features"] and hparams["wav_augment"]:
        raise UserError("cache_features is True, but wav_augment changes the waveforms in each epoch; switch one of them off.")
    datasets = {name: DynamicItemDataset(_items(path)) for name, path in manifests.items()}
    every = list(datasets.values())
    rate, audio = hparams["sample_rate"], "feats" if hparams["cache_features"] else "sig"
    tokens = _Tokens(hparams["tokenizer"], hparams["bos_index"], hparams["eos_index"])
    add_dynamic_item(every, tokens, "wrd", ["tokens", "tokens_bos", "tokens_eos"])
    samples = _CachedFeatures(hparams["speech_encoder"], rate) if hparams["cache_features"] else _Waveforms(rate)
    add_dynamic_item(every, samples, ["wav", *SEGMENT_FIELDS], audio)
    set_output_keys(every, ["id", audio, "duration", "wrd", "tokens", "tokens_bos", "tokens_eos"])
    return datasets


def _items(path):
    """The rows of a manifest by id. SpeechBrain's reader would substitute every $name in them, also in transcripts."""
    items = {}
    for row in read_manifest(path):
        key = row["ID"]
        if key in items:
            raise UserError(f"The manifest {path} has the id {key} twice; make ids unique.")
        item = {field: row[field] for field in ("wav", "spk_id")} | {"wrd": normal_form(row["wrd"])}
        item["duration"] = _number(float, row, "duration", path)
        item["start"] = _number(int, row, "start", path) or 0
        item |= {field: _number(int, row, field, path) for field in ("stop", "channel")}
        if not item["wrd"]:
            raise UserError(f"The manifest {path} has an empty transcript for {key}; leave this line out.")
        if item["stop"] is not None and item["stop"] <= item["start"]:
            raise UserError(
                f"The manifest {path} has the stop {item['stop']} for {key}; give a number above its start, {item['start']}."
            )
        items[key] = item
    if not items:
        raise UserError(f"The manifest {path} has no utterances; see skipped.csv.")
    return items


def _number(kind, row, field, path):
    """A number of a row; None if the field is empty."""
    try:
        value = kind(row[field]) if row.get(field) or kind is float else None
    except ValueError:
        value = math.nan
    if value is not None and not (0 <= value < math.inf and (value or kind is int)):  # also catches NaN
        wanted = "seconds above 0" if kind is float else "a whole number, 0 or more"
        raise UserError(f"The manifest {path} has the {field} {row[field]!r} for {row['ID']}; give {wanted}.")
    return value


def drop_unfit(dataset, hparams, listed_in, name):
    """Leave out utterances that have too few frames for the tokens of their transcript, so that nothing can train on them.

    CTC needs a frame for each token, and for a blank between repeated tokens. A transducer has several tokens per frame; beside
    it, CTC's loss of such utterances is 0. Speed perturbation reduces the number of frames.

    Arguments
    ---------
    dataset : DynamicItemDataset
        The training or validation set; it is changed in place.
    hparams : dict
        The hparams of the run, with a trained tokenizer.
    listed_in : str or os.PathLike
        A CSV file that lists these utterances: ID, tokens that CTC needs, frames.
    name : str
        Name of the dataset, for messages.

    Raises
    ------
    UserError
        If more than ``max_skipped`` are left out.
    """
    speech_encoder, tokenizer, transducer_cost = (hparams[key] for key in ("speech_encoder", "tokenizer", "transducer_cost"))
    augment = hparams["wav_augment"]
    held = getattr(augment, "augmentations", ())  # SpeechBrain's Augmenter holds several
    held = held.values() if isinstance(held, (Mapping, torch.nn.ModuleDict)) else held
    augments = augment, *(held if isinstance(held, Iterable) else ())
    fastest = max([100, *(speed for each in augments for speed in getattr(each, "speeds", ()))]) / 100
    unfit = []
    for key, item in dataset.data.items():
        ids = tokenizer.encode_as_ids(item["wrd"])
        needed = len(ids) + sum(one == other for one, other in zip(ids, ids[1:], strict=False))
        frames = speech_encoder.count_frames(int(float(item["duration"]) / fastest * hparams["sample_rate"]))
        if needed > frames and not (transducer_cost is not None and transducer_cost.fits(frames, len(ids))):
            unfit.append((key, needed, frames))
    if not unfit:
        run_on_main(Path(listed_in).unlink, kwargs={"missing_ok": True})  # of an earlier start
        return
    total = len(dataset.data)
    run_on_main(write_csv, [listed_in, ("ID", "tokens", "frames"), unfit])
    found = f"{len(unfit)} of {total} utterances have more tokens than frames, such as {unfit[0][0]}"
    if len(unfit) > math.ceil(hparams["max_skipped"] * total):
        raise UserError(
            f"{name}: {found}, more than the allowed {hparams['max_skipped']:.0%}; they are listed in {listed_in}: fix the "
            "transcripts, use longer tokens (vocab_size), or raise max_skipped."
        )
    logger.warning("%s: %s; they are left out, and listed in %s", name, found, listed_in)
    for key, *_ in unfit:
        del dataset.data[key]
    dataset.data_ids = list(dataset.data)


class Batch(PaddedBatch):
    """SpeechBrain's PaddedBatch with fewer copies to a device: one per large tensor, and one for all small tensors of a type.

    Only padded data is copied. Plain numbers, such as durations, stay on the host. So does a copy of the lengths; reading them
    from the device would wait for it.

    Arguments
    ---------
    examples : list of dict
        Items of a dataset.

    Example
    -------
    >>> batch = Batch([{"id": "a", "duration": 1.5, "sig": torch.ones(3)}, {"id": "b", "duration": 1.0, "sig": torch.ones(2)}])
    >>> batch.to("cpu").sig.data.shape, batch.host_lengths["sig"]
    (torch.Size([2, 3]), tensor([1.0000, 0.6667]))
    """

    def __init__(self, examples):
        super().__init__(examples)
        self.padded = [key for key in examples[0] if isinstance(getattr(self, key), PaddedData)]
        self.host_lengths = {key: getattr(self, key).lengths for key in self.padded}
        tensors = [tensor for key in self.padded for tensor in getattr(self, key)]
        self.shapes = [tensor.shape for tensor in tensors]
        groups = {}
        for i, tensor in enumerate(tensors):
            groups.setdefault(i if tensor.numel() > LARGE else tensor.dtype, []).append(i)
        self.groups = list(groups.values())
        flat = [[tensors[i].flatten() for i in group] for group in self.groups]
        self.flat = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in flat]

    def pin_memory(self):
        """Pin memory, in place; copies to a GPU are then asynchronous."""
        return self._replace(torch.Tensor.pin_memory)

    def to(self, device):
        """Copy to a device, in place; returns itself."""
        return self._replace(lambda tensor: tensor.to(device, non_blocking=torch.device(device).type != "cpu"))

    def _replace(self, move):
        self.flat, parts = [move(tensor) for tensor in self.flat], {}
        for group, tensor in zip(self.groups, self.flat, strict=True):
            pieces = tensor.split([self.shapes[i].numel() for i in group])
            parts |= {i: piece.view(self.shapes[i]) for i, piece in zip(group, pieces, strict=True)}
        for place, key in enumerate(self.padded):
            setattr(self, key, PaddedData(parts[2 * place], parts[2 * place + 1]))
        return self


ORDERS = ("random", "ascending", "descending")
"""Orders of batches in SpeechBrain's DynamicBatchSampler."""


class ShortFirstBatchSampler(DynamicBatchSampler):
    """SpeechBrain's DynamicBatchSampler that can sort the first epochs by length; CTC then finds its alignment sooner.

    Arguments
    ---------
    dataset : DynamicItemDataset
        The dataset.
    *args, **kwargs
        Arguments of DynamicBatchSampler.
    sorted_epochs : int
        Number of epochs at the start that begin with the shortest utterances.

    Raises
    ------
    UserError
        If a number is not whole or too small, or the order is unknown.
    """

    def __init__(self, dataset, *args, sorted_epochs=0, **kwargs):
        for name, least, value in (
            ("sorted_epochs", 0, sorted_epochs),
            *((name, 1, kwargs.get(name)) for name in ("num_buckets", "max_batch_ex")),
        ):
            if value is not None and not is_whole(value, least):
                raise UserError(f"{name} is {value!r}; give a whole number of {least} or more.")
        if kwargs.get("batch_ordering", ORDERS[0]) not in ORDERS:
            raise UserError(f"batch_ordering is {kwargs['batch_ordering']!r}; give {', '.join(ORDERS)}.")
        super().__init__(dataset, *args, **kwargs)
        self.sorted_epochs = sorted_epochs
        self.later_ordering = self._batch_ordering

    def set_epoch(self, epoch):
        """Make the batches of an epoch, counted from 1."""
        self._batch_ordering = "ascending" if epoch <= self.sorted_epochs else self.later_ordering
        super().set_epoch(epoch)


class MixedBatches:
    """Batches of a dataset in which some utterances are mixed in: each epoch draws its own share of them.

    The draw depends only on the seed and the epoch. An interrupted run therefore continues with the same batches.

    Arguments
    ---------
    dataset : DynamicItemDataset
        The dataset.
    make : callable
        Makes the batch sampler of a dataset.
    mixed : set of str
        Ids of the utterances to draw from; all others are in every epoch.
    share : float
        Share of drawn utterances in an epoch, not of their seconds. If there are too few, some are drawn more than once.
    seed : int
        Seed of the draws.

    Example
    -------
    >>> dataset = DynamicItemDataset({name: {"duration": 1.0} for name in "abcdefgh"})
    >>> from functools import partial
    >>> make = partial(DynamicBatchSampler, max_batch_length=2, num_buckets=1)
    >>> batches = MixedBatches(dataset, make, mixed={"d", "e", "f", "g", "h"}, share=0.25, seed=0)
    >>> for epoch in (1, 2):
    ...     batches.set_epoch(epoch)
    ...     print(sorted(dataset.data_ids[i] for batch in batches for i in batch))
    ['a', 'b', 'c', 'h']
    ['a', 'b', 'c', 'f']
    """

    def __init__(self, dataset, make, mixed, share, seed):
        self.dataset, self.make, self.seed = dataset, make, seed
        self.own = [i for i, key in enumerate(dataset.data_ids) if key not in mixed]
        self.others = [i for i, key in enumerate(dataset.data_ids) if key in mixed]
        self.number = round(share / (1 - share) * len(self.own)) if self.others else 0
        self.set_epoch(1)

    def set_epoch(self, epoch):
        """Make the batches of an epoch, counted from 1."""
        whole, rest = divmod(self.number, max(1, len(self.others)))
        drawn = random.Random(f"{self.seed}/{epoch}").sample(self.others, rest)
        self.places = self.own + whole * self.others + drawn
        chosen = copy.copy(self.dataset)
        chosen.data_ids = [self.dataset.data_ids[i] for i in self.places]
        self.sampler = self.make(chosen)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self):
        yield from ([self.places[i] for i in batch] for batch in self.sampler)

    def __len__(self):
        return len(self.sampler)


class BatchesOfProcess:
    """The batches of one process of distributed training. Together, the processes visit each utterance exactly once per epoch.

    All processes take the same number of batches. If the number of batches is not divisible, the largest are split in two.

    Arguments
    ---------
    sampler : DynamicBatchSampler
        The sampler; it must give the same batches in all processes.
    rank, world : int
        The number of this process, and the number of processes.

    Raises
    ------
    UserError
        In iteration, if there are fewer utterances than processes.

    Example
    -------
    >>> [list(BatchesOfProcess([[1, 2, 3], [4]], rank, 3)) for rank in range(3)]
    [[[1]], [[4]], [[2, 3]]]
    """

    def __init__(self, sampler, rank=0, world=1):
        self.sampler, self.rank, self.world = sampler, rank, world
        self._batches = None

    def set_epoch(self, epoch):
        """Make the batches of an epoch."""
        self._batches = None
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self):
        yield from self._own()

    def __len__(self):
        return len(self._own())

    def _own(self):
        if self._batches is None:
            self._batches = self._shared()[self.rank :: self.world]
        return self._batches

    def _shared(self):
        batches = list(self.sampler)
        while len(batches) % self.world or not batches:
            longest = max(range(len(batches)), key=lambda i: len(batches[i]), default=None)
            if longest is None or len(batches[longest]) < 2:
                utterances = sum(map(len, batches))
                raise UserError(f"{utterances} utterances are too few for {self.world} processes; start fewer processes.")
            half = len(batches[longest]) // 2
            batches[longest], rest = batches[longest][:half], batches[longest][half:]
            batches.append(rest)
        return batches


def loader_options(dataset, batch_sampler, num_workers):
    """Options of the data loader for a dataset.

    Arguments
    ---------
    dataset : DynamicItemDataset
        The dataset.
    batch_sampler : callable
        Makes the batch sampler of a dataset.
    num_workers : int
        Number of processes that read audio.

    Returns
    -------
    dict

    Raises
    ------
    UserError
        If the sampler refuses its settings, or there is no utterance.
    """
    if not len(dataset):
        raise UserError("There is no utterance left for training or testing; see the lists of skipped utterances.")
    try:
        sampler = batch_sampler(dataset)
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        if runs_foreign_code(error):
            raise  # a bug in the user's sampler
        raise UserError(f"The batch sampler refuses its settings: {one_line(error)}.") from error
    return {
        "batch_sampler": sampler,
        "collate_fn": Batch,
        "pin_memory": torch.cuda.is_available(),
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        # Without this, a starting loader draws from the global generator, and a resumed run starts its loader again
        "generator": torch.Generator(),
    }


# Classes, not nested functions: they are pickled for spawned workers, as on macOS


class _Waveforms:
    """Loads the samples of an audio file."""

    def __init__(self, sample_rate):
        self.sample_rate = sample_rate

    def __call__(self, wav, start, stop, channel):
        return load_audio(wav, self.sample_rate, start, stop, channel)  # (N,)


class _CachedFeatures:
    """Computes the features of an audio file, and keeps them in memory."""

    def __init__(self, speech_encoder, sample_rate):
        self.speech_encoder, self.sample_rate, self.cache = speech_encoder, sample_rate, {}

    def __call__(self, *place):
        if place not in self.cache:
            wav, *segment = place
            with torch.no_grad():
                feats, _ = self.speech_encoder.features(load_audio(wav, self.sample_rate, *segment).unsqueeze(0))
            self.cache[place] = feats.squeeze(0)
        return self.cache[place]  # (T, F)


class _Tokens:
    """Tokens of a transcript: alone, with bos before them, and with eos after them."""

    def __init__(self, tokenizer, bos, eos):
        self.tokenizer, self.bos, self.eos = tokenizer, bos, eos

    def __call__(self, wrd):
        ids = self.tokenizer.encode_as_ids(wrd)
        return tuple(torch.tensor(tokens, dtype=torch.long) for tokens in (ids, [self.bos, *ids], [*ids, self.eos]))
