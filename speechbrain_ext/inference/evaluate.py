"""Error rates and speed of a trained model on test sets, with any of its searches."""

import time

import torch
from speechbrain.utils.metric_stats import ErrorRateStats
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from speechbrain_ext.dataio.audio import load_audio
from speechbrain_ext.decoders import BEAM, GREEDY
from speechbrain_ext.decoders.alignment import greedy_tokens
from speechbrain_ext.inference.long_audio import window_frames
from speechbrain_ext.inference.transcribe import BATCH_SECONDS, LONG_SECONDS
from speechbrain_ext.utils.measure import synchronize


def make_searches(model, names=(), beam_size=None):
    """Searches of a model by name, with its phrases and language model.

    Arguments
    ---------
    model : CtcModel, JointModel or TransducerModel
        From :func:`speechbrain_ext.inference.load_model`.
    names : sequence of str
        ``ctc_greedy``, ``ctc_beam`` and, with a decoder, ``joint_beam`` and ``ctc_rescored`` or, with a transducer,
        ``transducer_greedy`` and ``transducer_beam``; by default the searches that the model uses.
    beam_size : int, optional
        Number of hypotheses of the beams; by default that of the model.

    Returns
    -------
    dict
        A callable for each name. It takes log-probabilities (B, T, V), encoder frames (B, T, D) or None for a model without a
        decoder, and relative lengths (B,), and returns texts.

    Raises
    ------
    UserError
        If the model lacks a search, or none of the searches takes the beam size, the phrases or the language model.
    """
    with model.choosing():
        if names:
            model.choose_search(*names)
        if beam_size is not None:
            model.choose_beam(beam_size)

    def by_tokens(search):
        return lambda *given: [" ".join(model.tokenizer.decode_ids(ids).split()) for ids in search(*given)]

    found = {}
    for name in model.own_searches:
        if name == BEAM:
            found[name] = by_tokens(lambda log_probs, frames, lens: model.search_ctc(log_probs, lens))
        elif name == GREEDY:
            found[name] = by_tokens(lambda log_probs, frames, lens: greedy_tokens(log_probs, lens, model.blank))
        else:
            found[name] = by_tokens(lambda log_probs, frames, lens, name=name: model.search(frames, lens, name))
    return found


@torch.inference_mode()
def evaluate(model, rows, searches, progress=False):
    """Transcribe utterances in batches of about the same length, and compare the texts with the references.

    The encoder runs once for all searches. It takes utterances longer than a minute in windows, as in
    :func:`speechbrain_ext.inference.transcribe.transcribe_files`.

    Arguments
    ---------
    model : CtcModel, JointModel or TransducerModel
        From :func:`speechbrain_ext.inference.load_model`.
    rows : list of speechbrain_ext.dataio.preparation.Row
        The utterances, with transcripts written like those that the model was trained on.
    searches : dict
        From :func:`make_searches`.
    progress : bool
        Whether to show a bar on standard error.

    Returns
    -------
    error_rates : dict
        An ErrorRateStats for each search.
    seconds : dict
        Seconds of encoder and search together, for each search, without reading the audio.

    Raises
    ------
    AudioError
        If a file cannot be read.
    """
    error_rates, seconds = {name: ErrorRateStats() for name in searches}, dict.fromkeys(searches, 0.0)
    with tqdm(total=round(sum(row.duration for row in rows)), unit=" s", disable=not progress) as bar:
        for batch in _batches(rows):
            segments = [(row.start or 0, row.stop, row.channel) for row in batch]
            wavs = [load_audio(row.wav, model.sample_rate, *segment) for row, segment in zip(batch, segments, strict=True)]
            began = time.perf_counter()
            found = _encode(model, wavs)
            encoded = time.perf_counter() - began
            for name, search in searches.items():
                began = time.perf_counter()
                texts = search(*found)
                synchronize(model.device)
                seconds[name] += encoded + time.perf_counter() - began
                said = [row.wrd.split() for row in batch]
                error_rates[name].append([row.ID for row in batch], [text.split() for text in texts], said)
            bar.update(round(sum(row.duration for row in batch)))
    return error_rates, seconds


def _batches(rows):
    """The batches, the longest utterances first, because an error for lack of memory then occurs at once."""
    batches = []
    for row in sorted(rows, key=lambda row: row.duration):
        if not batches or (len(batches[-1]) + 1) * row.duration > BATCH_SECONDS:
            batches.append([])
        batches[-1].append(row)
    return reversed(batches)


def _encode(model, wavs):
    """Log-probabilities (B, T, V), frames (B, T, D) or None, and relative lengths (B,)."""
    if len(wavs[0]) > LONG_SECONDS * model.sample_rate:  # a long utterance is alone in its batch
        parts = zip(*window_frames(model, wavs), strict=True)
        found = [[None if part[0] is None else torch.cat(part)] for part in parts]
    else:
        lengths = torch.tensor([len(wav) for wav in wavs])
        found = model.frames(pad_sequence(wavs, batch_first=True), lengths / lengths.max())
    log_probs, frames = (None if rows[0] is None else pad_sequence(rows, batch_first=True) for rows in found)
    lengths = torch.tensor([len(row) for row in found[0]], device=log_probs.device)
    synchronize(model.device)
    return log_probs, frames, lengths / lengths.max()
