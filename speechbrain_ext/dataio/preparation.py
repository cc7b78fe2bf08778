"""Check the utterances of a corpus, and write manifests.

All audio is checked. Unusable utterances are left out, counted, and listed in ``skipped.csv``; too many of them stop the run.
Manifests are complete or absent, and are only written again if something has changed.
"""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from typing import NamedTuple

from speechbrain.utils.parallel import parallel_map

from speechbrain_ext.dataio.audio import AudioError, check_audio
from speechbrain_ext.dataio.datasets import write_manifest
from speechbrain_ext.dataio.resampling import SAMPLE_RATE
from speechbrain_ext.utils.errors import UserError, UserRuntimeError
from speechbrain_ext.utils.files import file_digest, write_csv, write_text

logger = logging.getLogger(__name__)

MIN_SECONDS = 0.1  # no word is shorter; such a file is an error of segmentation
SLACK_SECONDS, SLACK = 0.02, 0.01  # allowed deviation of a stated duration, added: durations are rounded, and codecs pad
MARGIN_SECONDS = 1  # speech that was cut out may have this much around it

TOO_LONG = "longer than"
"""The beginning of the reason of utterances that are left out only for their length: it is a choice, not a flaw."""
SKIPPED_FILE = "skipped.csv"
MARKER_FILE = "prepared.json"


class File(NamedTuple):
    """A file of the corpus, with its size and time, which show whether it has changed."""

    path: str
    size: int
    modified: int


class Utterance(NamedTuple):
    """An utterance as the corpus describes it."""

    ID: str
    wav: str
    spk_id: str = "unknown"
    wrd: str | None = None
    """The transcript; None if it is missing."""
    start: float | None = None
    """Start in the audio, in seconds."""
    stop: float | None = None
    in_samples: bool = False
    """Whether start and stop are in samples."""
    channel: int | None = None
    duration: float | None = None
    """The stated duration in seconds, of the utterance or of the whole file."""
    times: tuple[float, float] | None = None
    """Start and end in seconds that may be those of a segment, or of speech that was cut out already."""


class Skipped(NamedTuple):
    """An utterance that was left out, with the kind of ``reason`` and a ``detail``."""

    split: str
    ID: str
    file: str
    reason: str
    detail: str = ""


class Row(NamedTuple):
    """A line of a manifest, with the sample rate and number of channels of its audio."""

    ID: str
    duration: float
    wav: str
    start: int | None
    stop: int | None
    channel: int | None
    spk_id: str
    wrd: str
    sample_rate: int
    channels: int


def check_utterances(split, utterances, max_seconds=math.inf):
    """Check the audio of utterances in parallel, each file once and as a whole.

    Arguments
    ---------
    split : str
        The name of the split.
    utterances : sequence of Utterance
    max_seconds : float
        Longer utterances are left out.

    Returns
    -------
    rows : list of Row
        In the same order.
    skipped : list of Skipped

    Example
    -------
    >>> import tempfile, numpy, soundfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/a.wav", numpy.zeros(16000), 16000)
    ...     given = Utterance("a", f"{folder}/a.wav", start=0.5), Utterance("b", f"{folder}/b.wav")
    ...     rows, skipped = check_utterances("train", given)
    >>> rows[0].start, rows[0].stop, rows[0].duration, skipped[0].reason
    (8000, 16000, 0.5, 'missing')
    """
    paths = list(dict.fromkeys(utterance.wav for utterance in utterances))
    bar = {"desc": f"Checking {split}", "unit": " files", "smoothing": 0.02}
    found = dict(zip(paths, parallel_map(_check, paths, progress_bar_kwargs=bar), strict=True))
    rows, skipped, seconds = [], [], 0.0
    for utterance in utterances:
        row = _row(utterance, found[utterance.wav])
        if isinstance(row, Row) and row.duration > max_seconds:
            seconds += row.duration
            row = _Flaw(f"{TOO_LONG} {max_seconds:g} s", f"{row.duration:.1f} s")
        if isinstance(row, Row):
            rows.append(row)
        else:
            skipped.append(Skipped(split, utterance.ID, utterance.wav, *row))
    if seconds:
        said = "%s: utterances longer than %g s (--max_duration) are left out; they have %.2f hours together"
        logger.warning(said, split, max_seconds, seconds / 3600)
    return rows, skipped


class _Flaw(NamedTuple):
    """Why an utterance cannot be used."""

    reason: str
    detail: str


def _check(path):
    """The properties of an audio file, or its flaw; runs in a worker process."""
    try:
        return check_audio(path)
    except AudioError as error:
        return _Flaw(error.reason, str(error))


def _row(utterance, info):
    """The row of an utterance, or its flaw."""
    if isinstance(info, _Flaw):
        return info
    rate, frames = info.sample_rate, info.num_frames
    start, stop = ((value if utterance.in_samples else value * rate) for value in (utterance.start or 0, utterance.stop or 0))
    start, stop = round(start), frames if utterance.stop is None else round(stop)
    duration = (stop - start) / rate
    if start < 0 or not start < stop <= frames + rate * (SLACK_SECONDS + SLACK * duration):
        return _Flaw("segment outside of its audio", f"{start / rate:g} to {stop / rate:g} s of {info.duration:g} s")
    stop = min(stop, frames)
    duration = (stop - start) / rate
    stated = utterance.duration
    if stated is not None and not any(abs(stated - is_) <= SLACK_SECONDS + SLACK * is_ for is_ in (duration, info.duration)):
        remedy = "; a segment needs start and end" if utterance.start is None and stated < duration else ""
        return _Flaw("wrong duration", f"{stated:g} s are stated, but the audio has {duration:g} s{remedy}")
    begin, end = utterance.times or (0, info.duration)
    if end <= info.duration and end - begin < info.duration - MARGIN_SECONDS:
        remedy = "name these times start and end for a segment, or state the duration if all of the audio counts"
        return _Flaw("unclear segment", f"{begin:g} to {end:g} s of {info.duration:g} s; {remedy}")
    if utterance.channel is not None and not 0 <= utterance.channel < info.channels:
        return _Flaw("no such channel", f"{utterance.channel} of {info.channels}, counted from 0")
    if duration < MIN_SECONDS:
        return _Flaw(f"shorter than {MIN_SECONDS} s", f"{duration:.4f} s")
    start, stop = (None, None) if (start, stop) == (0, frames) else (start, stop)
    channel = utterance.channel if info.channels > 1 else None
    return Row(utterance.ID, duration, utterance.wav, start, stop, channel, utterance.spk_id, utterance.wrd, rate, info.channels)


def write_manifests(save_folder, splits, make, state, max_skipped, merged=None):
    """Write the manifest ``<split>.csv`` of every split, unless an earlier call did and nothing has changed since.

    Arguments
    ---------
    save_folder : pathlib.Path
        The folder to write to; created if it is missing.
    splits : list of str
        Names of the splits; the last one is made first.
    make : callable
        Takes the name of a split; returns its rows, the skipped utterances, and the number of all its utterances.
    state : dict
        All that the manifests depend on, in values that JSON can hold.
    max_skipped : float
        The largest share of a split that may be left out, from 0 to 1, rounded up to whole utterances; without those that are
        only too long.
    merged : dict, optional
        Further manifests: lists of splits by file name.

    Raises
    ------
    UserError
        If ``max_skipped`` is not from 0 to 1.
    UserRuntimeError
        If too many utterances of a split are unusable; then no manifest is written.
    """
    if not 0 <= max_skipped <= 1:
        raise UserError(f"max_skipped is {max_skipped}; give a share of a split, from 0 to 1.")
    save_folder.mkdir(parents=True, exist_ok=True)
    if _is_prepared(save_folder, state):
        logger.info("The manifests in %s are complete and up to date: nothing to prepare.", save_folder)
        return
    (save_folder / MARKER_FILE).unlink(missing_ok=True)
    rows, skipped = {}, []
    for split in reversed(splits):
        rows[split], skips, total = make(split)
        skipped += skips
        write_csv(save_folder / SKIPPED_FILE, Skipped._fields, sorted(skipped))
        _report(split, rows[split], skips, total, save_folder / SKIPPED_FILE, max_skipped)
    manifests = {f"{split}.csv": [split] for split in splits} | (merged or {})
    for name, parts in manifests.items():
        write_manifest(save_folder / name, [row._asdict() for split in parts for row in rows[split]])
    digests = {name: file_digest(save_folder / name) for name in [*manifests, SKIPPED_FILE]}
    write_text(save_folder / MARKER_FILE, json.dumps(state | {"manifests": digests}, indent=2))


def files_digest(files):
    """A digest that shows whether any of some files has changed.

    Arguments
    ---------
    files : iterable of File

    Returns
    -------
    str
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(f"{file.path}\0{file.size}\0{file.modified}\n"))
    return digest.hexdigest()


def _is_prepared(save_folder, state):
    """Whether an earlier call with this state was completed, and its manifests are unchanged."""
    try:
        earlier = json.loads((save_folder / MARKER_FILE).read_text(encoding="utf-8"))
        manifests = earlier.pop("manifests")
        intact = all(file_digest(save_folder / name) == digest for name, digest in manifests.items())
        return earlier == state and intact
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no marker, a foreign file, or a missing manifest
        return False


def _report(split, rows, skipped, total, listed_in, max_skipped):
    """Log the size of a split and its skipped utterances; raise an error if these are too many."""
    hours = sum(row.duration for row in rows) / 3600
    logger.info("%s: %d utterances, %.2f hours", split, len(rows), hours)
    rates = {row.wav: row.sample_rate for row in rows if row.sample_rate != SAMPLE_RATE}
    for value, count in Counter(rates.values()).items():
        logger.info("%s: %d files have %d Hz; they are resampled when read, unless the model has this rate.", split, count, value)
    if several := len({row.wav for row in rows if row.channels > 1 and row.channel is None}):
        logger.info("%s: %d files have several channels, which are averaged when read.", split, several)
    if not skipped:
        return
    reasons = Counter(skip.reason for skip in skipped).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    logger.warning("%s: %d of %d utterances skipped: %s; listed in %s", split, len(skipped), total, counts, listed_in)
    flawed = [each for each in reasons if not each[0].startswith(TOO_LONG)] if rows else reasons
    count = sum(number for _, number in flawed)
    if not rows or count > math.ceil(max_skipped * total):
        allowed, (reason, often) = f", more than the allowed {max_skipped:.0%}" if rows else "", flawed[0]
        remedy = "raise --max_duration" if reason.startswith(TOO_LONG) else "fix the corpus"
        raise UserRuntimeError(
            f"{count} of {total} utterances in {split} cannot be used{allowed}, most often because of '{reason}' ({often}); they "
            f"are listed in {listed_in}: {remedy}{', or raise max_skipped' if rows else ''}."
        )
