"""From manifests to batches: the tokenizer, the datasets and the options of their loaders."""

import csv
import io
import os
from pathlib import Path

import sentencepiece
import torch
from speechbrain.dataio.dataset import DynamicItemDataset, add_dynamic_item, set_output_keys
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.data_pipeline import provides, takes

from speechbrain_ext.inference.audio import load_audio


def train_tokenizer(manifest, path, vocab_size, token_type, blank_index, bos_index, eos_index, unk_index):
    """Train a SentencePiece tokenizer on the transcripts of a manifest, unless its file is there already.

    Arguments
    ---------
    manifest : str
        CSV file with a column ``wrd``.
    path : str
        The model file to write, complete or not at all.
    vocab_size : int
        The number of tokens; where the transcripts do not give as many, there are fewer.
    token_type : str
        ``unigram``, ``bpe`` or ``char``.
    blank_index, bos_index, eos_index, unk_index : int
        Ids of the special tokens. The tokenizer knows the blank as padding: no text has it, and decoding leaves it out.

    Raises
    ------
    ValueError
        If the vocabulary is too small for the characters of the transcripts.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "train.csv").write_text("ID,wrd\\na,THE CAT SAT\\nb,A CAT AND THE HAT\\n")
    >>> train_tokenizer(folder / "train.csv", folder / "t.model", 1000, "unigram", 0, 1, 2, 3)
    >>> tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "t.model"))
    >>> tokenizer.decode_ids([0, 1, *tokenizer.encode_as_ids("THE HAT"), 2])
    'THE HAT'
    """
    path = Path(path)
    if path.exists():
        return
    with open(manifest, encoding="utf-8", newline="") as file:
        transcripts = [row["wrd"] for row in csv.DictReader(file)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(transcripts),
            model_writer=model,
            model_type=token_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            pad_id=blank_index,
            bos_id=bos_index,
            eos_id=eos_index,
            unk_id=unk_index,
            num_threads=1,  # the result depends on the number
            max_sentence_length=100_000,  # bytes; longer transcripts would be left out
            minloglevel=2,
        )
    except (RuntimeError, OSError, SyntaxError) as error:  # the last one for an unknown token_type
        characters = len(set("".join(transcripts)))
        raise ValueError(
            f"No {token_type} tokenizer of {vocab_size} tokens can be made from transcripts with {characters} different "
            f"characters; raise vocab_size ({' '.join(str(error).split())})."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, path)


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
        raise ValueError("cache_features is True, and wav_augment changes the waveforms each time; switch one of them off.")
    datasets = {name: DynamicItemDataset.from_csv(str(path)) for name, path in manifests.items()}
    every = list(datasets.values())
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
    cache = {}

    @takes("wav")
    @provides("feats")
    def features(wav):
        if wav not in cache:
            with torch.no_grad():
                cache[wav] = hparams["compute_features"](load_audio(wav).unsqueeze(0)).squeeze(0)
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
