"""From manifests to batches: datasets, and the options of their loaders."""

import csv

import torch
from speechbrain.dataio.dataset import DynamicItemDataset, add_dynamic_item, set_output_keys
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.data_pipeline import provides, takes

from speechbrain_ext.dataio.audio import load_audio
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.files import write_csv

MANIFEST_FIELDS = ("ID", "duration", "wav", "spk_id", "wrd")
"""Columns of a manifest: id, seconds, path of the audio, speaker, transcript."""


def merge_manifests(paths, path):
    """Write the rows of several manifests as one.

    Arguments
    ---------
    paths : list of str or os.PathLike
        CSV files with the columns :data:`MANIFEST_FIELDS`.
    path : str or os.PathLike
        The file to write.
    """
    rows = []
    for part in paths:
        with open(part, encoding="utf-8", newline="") as file:
            rows += [[row[field] for field in MANIFEST_FIELDS] for row in csv.DictReader(file)]
    write_csv(path, MANIFEST_FIELDS, rows)


def make_datasets(hparams, manifests):
    """Datasets whose items are utterances with waveforms or features, and tokens.

    Arguments
    ---------
    hparams : dict
        The hparams of the run, its tokenizer trained.
    manifests : dict
        CSV files by any names.

    Returns
    -------
    dict
        A DynamicItemDataset of each manifest. Items have ``id``, ``duration`` (seconds), ``wrd`` (the transcript), ``tokens``,
        ``tokens_bos`` and ``tokens_eos``, and either ``sig`` (samples) or, with ``cache_features``, ``feats``.

    Raises
    ------
    ValueError
        If waveforms should be augmented and features be cached.
    """
    if hparams["cache_features"] and hparams["wav_augment"]:
        raise UserError("cache_features is True, and wav_augment changes the waveforms each time; switch one of them off.")
    datasets = {name: DynamicItemDataset.from_csv(str(path)) for name, path in manifests.items()}
    every = list(datasets.values())
    for dataset in every:
        for item in dataset.data.values():
            item["wrd"] = normal_form(item["wrd"])
    add_dynamic_item(every, _text_pipeline(hparams))
    add_dynamic_item(every, _cached_features(hparams) if hparams["cache_features"] else _waveforms)
    audio = "feats" if hparams["cache_features"] else "sig"
    set_output_keys(every, ["id", audio, "duration", "wrd", "tokens", "tokens_bos", "tokens_eos"])
    return datasets


class ShortFirstBatchSampler(DynamicBatchSampler):
    """SpeechBrain's DynamicBatchSampler that can begin with epochs by length, in which CTC finds its alignment sooner.

    Arguments
    ---------
    dataset : DynamicItemDataset
        The dataset.
    *args, **kwargs
        As of DynamicBatchSampler.
    sorted_epochs : int
        The first so many epochs have the batches with the shortest utterances first.
    """

    def __init__(self, dataset, *args, sorted_epochs=0, **kwargs):
        super().__init__(dataset, *args, **kwargs)
        self.sorted_epochs = sorted_epochs
        self.later_ordering = self._batch_ordering

    def set_epoch(self, epoch):
        """Make the batches of an epoch, counted from 1."""
        self._batch_ordering = "ascending" if epoch <= self.sorted_epochs else self.later_ordering
        super().set_epoch(epoch)


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
    """
    return {
        "batch_sampler": batch_sampler(dataset),
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        # Its own generator: otherwise a loader draws from the global one when it starts, and a resumed run starts it again.
        "generator": torch.Generator(),
    }


@takes("wav")
@provides("sig")
def _waveforms(wav):
    return load_audio(wav)


def _cached_features(hparams):
    cache, speech_encoder = {}, hparams["speech_encoder"]

    @takes("wav")
    @provides("feats")
    def features(wav):
        if wav not in cache:
            with torch.no_grad():
                cache[wav] = speech_encoder.features(load_audio(wav).unsqueeze(0))[0].squeeze(0)
        return cache[wav]  # (T, F)

    return features


def _text_pipeline(hparams):
    tokenizer, bos, eos = hparams["tokenizer"], hparams["bos_index"], hparams["eos_index"]

    @takes("wrd")
    @provides("tokens", "tokens_bos", "tokens_eos")
    def tokens(wrd):
        ids = tokenizer.encode_as_ids(wrd)
        yield torch.tensor(ids, dtype=torch.long)
        yield torch.tensor([bos, *ids], dtype=torch.long)
        yield torch.tensor([*ids, eos], dtype=torch.long)

    return tokens
