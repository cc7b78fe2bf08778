"""The embedded mini corpus: synthetic English in LibriSpeech layout, built locally without a download.

Every recipe can run on it from start to end in minutes. Sentences come from a small grammar, speech comes from eSpeak NG
(the PyPI package ``espeakng-loader`` contains the library and its voices). A voice is a timbre, an accent, a pitch, a
rate and a recording condition (noise colour, signal-to-noise ratio, level). The splits share no timbre and no sentence,
so the error rate is for unseen speakers.
"""

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from speechbrain.utils.parallel import parallel_map

from recipes.LibriSpeech.prepare import prepare_librispeech
from speechbrain_ext.utils.errors import UserError, UserImportError, UserRuntimeError

SAMPLE_RATE = 16000
ESPEAK_SAMPLE_RATE = 22050
MIN_WORDS, MAX_WORDS = 3, 8

# A symbol in braces is replaced by any of its expansions. All verbs are in the past tense, which fits any subject.
GRAMMAR = {
    "sentence": (
        "{who} {did} {what}",
        "{who} {did} {what} {where}",
        "{who} {did} {what} {when}",
        "{when} {who} {did} {what}",
        "{who} {moved} {where}",
        "{who} {moved}",
        "{when} {who} {moved} {where}",
        "{who} and {who} {moved}",
        "{who} gave {who} {what}",
    ),
    "who": ("{whose} {person}", "{whose} {person}", "{whose} {trait} {person}"),
    "what": ("{whose} {thing}", "{number} {look} {things}", "{whose} {look} {thing}"),
    "where": ("near the {place}", "behind the {place}", "across the {place}"),
    "when": ("yesterday", "last {season}", "this morning", "on sunday"),
    "whose": ("the", "my", "every"),
    "number": ("two", "three", "seven"),
    "trait": ("young", "happy", "clever", "famous", "quiet"),
    "person": tuple("sailor teacher farmer doctor sister brother captain painter neighbour woman".split()),
    "did": ("carried", "found", "painted", "bought", "washed", "opened", "borrowed", "forgot", "repaired"),
    "moved": ("danced", "waited", "walked slowly", "laughed", "slept", "sang loudly"),
    "look": ("yellow", "green", "heavy", "wooden", "small", "black"),
    "thing": ("basket", "letter", "guitar", "umbrella", "lantern", "bicycle", "mirror", "boat", "clock"),
    "things": ("baskets", "letters", "lanterns", "mirrors", "boats", "clocks"),
    "place": tuple("garden river market bridge forest village harbour mountain kitchen station".split()),
    "season": ("winter", "summer", "night", "week"),
}

# eSpeak variants that are intelligible: no whisper, no robot and no strongly moved formants. The breathy Klatt variants
# are left out, because their noise comes from an unseeded generator.
TIMBRES = {
    "train-mini": (
        "m1 m2 m4 m5 m6 m8 f1 f3 f4 f5 klatt2 klatt3 Alex Andrea Gene Henrique Mario Mike Nguyen adam anika belinda "
        "david ed edward grandma ian john max michel norbert paul quincy rob sandro shelby steph2 victor"
    ).split(),
    "dev-mini": "m7 Hugo Annie klatt robert steph".split(),
    "test-mini": "m3 f2 Michael benjamin linda miguel pablo pedro Denis steph3".split(),
}
# Voices with the same timbre differ in all other properties. This variety helps to recognise unseen voices.
VOICES_PER_TIMBRE = {"train-mini": 4, "dev-mini": 1, "test-mini": 1}
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-us-nyc")
UTTERANCES = {"train-mini": 1520, "dev-mini": 120, "test-mini": 240}


@dataclass(frozen=True)
class Speaker:
    """One voice and all its sentences; it can be pickled for parallel synthesis.

    Arguments
    ---------
    split : str
        Name of the split.
    id : int
        Speaker id, unique in the corpus.
    timbre : str
        eSpeak voice variant.
    seed : int
        Seed of the voice's random choices.
    sentences : tuple
        Sentences of the voice, in lower case.
    """

    split: str
    id: int
    timbre: str
    seed: int
    sentences: tuple


def prepare_synthetic(data_folder, save_folder, tr_splits=(), dev_splits=(), te_splits=(), text_normalization="upper"):
    """Build the corpus if it is missing, and write its manifests.

    Arguments
    ---------
    data_folder : str, optional
        The corpus folder; by default it is found or built in the user's cache.
    save_folder : str
        The folder for the manifests.
    tr_splits, dev_splits, te_splits : list of str
        Names of splits.
    text_normalization : str
        Case of the transcripts: "upper", "lower" or "none" (unchanged).
    """
    folder = data_folder or build_mini_corpus()
    splits = {"tr_splits": tr_splits, "dev_splits": dev_splits, "te_splits": te_splits}
    prepare_librispeech(folder, save_folder, **splits, text_normalization=text_normalization)


def build_mini_corpus(folder=None, seed=1986, utterances=None):
    """Builds the mini corpus, or finds the one that an earlier call built.

    The corpus is built in a temporary folder, which is renamed when it is complete. The name of the corpus folder has a
    hash of this file, the arguments and the version of the synthesiser, so data of other settings are never used.

    Arguments
    ---------
    folder : str, optional
        Cache folder that holds the corpus folder. By default ``$SPEECHBRAIN_EXT_CACHE``, else ``speechbrain_ext`` in
        the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``).
    seed : int
        Seed of all choices; the same seed gives the same bytes.
    utterances : dict, optional
        Number of utterances of each split ``train-mini``, ``dev-mini`` and ``test-mini``, spread evenly over its
        voices. Other splits have none. By default ``UTTERANCES``.

    Returns
    -------
    path : pathlib.Path
        The corpus folder: ``<split>/<speaker>/<chapter>/`` with ``<speaker>-<chapter>-<utterance>.flac`` and
        ``<speaker>-<chapter>.trans.txt``.

    Raises
    ------
    ModuleNotFoundError
        If the package ``espeakng-loader`` is not installed.
    ValueError
        If ``utterances`` names an unknown split or holds a negative number.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as cache:
    ...     corpus = build_mini_corpus(cache, utterances={"train-mini": 2, "dev-mini": 1, "test-mini": 1})
    ...     sorted(path.name for path in corpus.glob("test-mini/*/*/*"))
    ['2001-1-0000.flac', '2001-1.trans.txt']
    """
    utterances = UTTERANCES if utterances is None else dict(utterances)
    for split, count in utterances.items():
        if split not in TIMBRES or count < 0:
            raise UserError(f"The mini corpus cannot have {count} utterances in '{split}'; give counts for {', '.join(TIMBRES)}.")
    try:
        version = metadata.version("espeakng-loader")
    except metadata.PackageNotFoundError:
        raise UserImportError(
            "The mini corpus needs the package espeakng-loader, which is missing; install it with: pip install -e '.[recipes]'"
        ) from None

    settings = json.dumps([seed, sorted(utterances.items()), version]).encode()
    key = hashlib.sha256(Path(__file__).read_bytes() + settings).hexdigest()[:12]
    cache = Path(folder) if folder is not None else default_cache_folder()
    corpus = cache / f"mini-corpus-{key}"
    if (corpus / ".completed").exists():
        return corpus

    shutil.rmtree(corpus, ignore_errors=True)  # a folder without the marker is incomplete
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{corpus.name}.", suffix=".tmp", dir=cache) as temporary:
        build = Path(temporary) / corpus.name
        speakers = draw_speakers(seed, utterances)
        jobs = [(speaker, build) for speaker in speakers]
        bar = {"desc": "Building the mini corpus", "unit": " voices"}
        seconds = sum(parallel_map(synthesise_speaker, jobs, chunk_size=1, progress_bar_kwargs=bar))
        (build / ".completed").write_text(f"{len(speakers)} voices, {seconds / 3600:.2f} hours\n")
        try:
            build.rename(corpus)
        except OSError:
            # Another process may have built the same corpus meanwhile; its files are equal.
            if not (corpus / ".completed").exists():
                raise
    return corpus


def default_cache_folder():
    """Returns the default cache folder: ``$SPEECHBRAIN_EXT_CACHE``, or a folder in the user's cache.

    Returns
    -------
    path : pathlib.Path
    """
    if os.environ.get("SPEECHBRAIN_EXT_CACHE"):
        return Path(os.environ["SPEECHBRAIN_EXT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speechbrain_ext"


def generate_sentences(rng):
    """Generates an endless sequence of different sentences of the grammar, in lower case.

    Arguments
    ---------
    rng : numpy.random.Generator
        Source of the choices.

    Yields
    ------
    sentence : str

    Example
    -------
    >>> next(generate_sentences(np.random.default_rng(3)))
    'the farmer and every neighbour laughed'
    """
    seen = set()
    while True:
        sentence = "{sentence}"
        while "{" in sentence:
            symbol = sentence[sentence.index("{") + 1 : sentence.index("}")]
            sentence = sentence.replace("{" + symbol + "}", rng.choice(GRAMMAR[symbol]), 1)
        if sentence not in seen and MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
            seen.add(sentence)
            yield sentence


def draw_speakers(seed, utterances):
    """Draws the voices of all splits and gives each its sentences; no sentence is given twice.

    Arguments
    ---------
    seed : int
        Seed of the choices.
    utterances : dict
        Number of utterances of each split.

    Returns
    -------
    speakers : list
        One ``Speaker`` for each voice with at least one sentence.
    """
    sentences = generate_sentences(np.random.default_rng(seed))
    speakers = []
    for s, split in enumerate(TIMBRES):
        texts = list(islice(sentences, utterances.get(split, 0)))
        timbres = TIMBRES[split] * VOICES_PER_TIMBRE[split]
        voices = len(timbres)
        for v, timbre in enumerate(timbres):
            if texts[v::voices]:
                speakers.append(Speaker(split, 1000 * s + v + 1, timbre, seed, tuple(texts[v::voices])))
    return speakers


def synthesise_speaker(job):
    """Writes the audio and the transcripts of one voice.

    Arguments
    ---------
    job : tuple
        The ``Speaker`` and the corpus folder.

    Returns
    -------
    seconds : float
        Duration of the written audio.
    """
    speaker, corpus = job
    # The choices depend only on the seed and the id, not on other voices or the process.
    rng = np.random.default_rng([speaker.seed, speaker.id])
    voice = f"{rng.choice(ACCENTS)}+{speaker.timbre}"
    rate, pitch, pitch_range = rng.integers(140, 200), rng.integers(30, 70), rng.integers(35, 65)
    noise_slope, snr_db, level_db = rng.uniform(0, 1), rng.uniform(15, 35), rng.uniform(-36, -23)

    chapter = corpus / speaker.split / str(speaker.id) / "1"
    chapter.mkdir(parents=True)
    transcripts, seconds = [], 0.0
    with Synthesiser(voice, rate, pitch, pitch_range, seed=speaker.seed) as synthesise:
        for u, sentence in enumerate(speaker.sentences):
            speech = resample_poly(synthesise(sentence), SAMPLE_RATE, ESPEAK_SAMPLE_RATE)
            speech /= np.sqrt(np.mean(speech**2))
            speech = np.pad(speech, rng.integers(SAMPLE_RATE // 20, SAMPLE_RATE // 4, size=2))
            noise = 10 ** (-(snr_db + rng.uniform(-3, 3)) / 20) * coloured_noise(rng, len(speech), noise_slope)
            audio = 10 ** ((level_db + rng.uniform(-3, 3)) / 20) * (speech + noise)
            name = f"{speaker.id}-1-{u:04d}"
            soundfile.write(chapter / f"{name}.flac", audio.clip(-1, 1), SAMPLE_RATE, subtype="PCM_16")
            transcripts.append(f"{name} {sentence.upper()}\n")
            seconds += len(audio) / SAMPLE_RATE
    (chapter / f"{speaker.id}-1.trans.txt").write_text("".join(transcripts))
    return seconds


def coloured_noise(rng, length, slope):
    """Draws noise of unit power whose spectrum falls by ``10 * slope`` dB per decade (0: white, 1: pink).

    Arguments
    ---------
    rng : numpy.random.Generator
        Source of the noise.
    length : int
        Number of samples.
    slope : float
        Exponent of the decrease of power with frequency.

    Returns
    -------
    noise : numpy.ndarray
        Shape (length,).

    Example
    -------
    >>> float(coloured_noise(np.random.default_rng(0), 1000, 0.5).std().round(3))
    1.0
    """
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum[0] = 0
    spectrum[1:] *= np.arange(1, len(spectrum)) ** (-slope / 2)
    noise = np.fft.irfft(spectrum, length)
    return noise / noise.std()


class Synthesiser:
    """eSpeak NG with one voice: a context manager that turns text into samples.

    Arguments
    ---------
    voice : str
        eSpeak voice, ``<language>+<variant>``.
    rate : int
        Words per minute.
    pitch : int
        0 to 100; 50 is the default of the voice.
    pitch_range : int
        0 to 100; 50 is the default of the voice.
    seed : int
        Seed of eSpeak's random choices.

    Raises
    ------
    RuntimeError
        If eSpeak does not have the language. (It ignores an unknown variant.)

    Example
    -------
    >>> with Synthesiser("en-us+m3", rate=160, pitch=50, pitch_range=50, seed=1) as synthesise:
    ...     samples = synthesise("hello")
    >>> samples.dtype
    dtype('float64')
    """

    # Constants of eSpeak's speak_lib.h.
    AUDIO_OUTPUT_SYNCHRONOUS, POS_CHARACTER, CHARS_UTF8 = 2, 1, 1
    RATE, PITCH, PITCH_RANGE = 1, 3, 4
    CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def __init__(self, voice, rate, pitch, pitch_range, seed):
        import espeakng_loader  # imported here, because build_mini_corpus has the message for a missing package

        # eSpeak keeps state between utterances (flutter, noise), and no function resets it. A private copy of the library
        # has new state.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self.espeak = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
        self.chunks = []
        self.callback = self.CALLBACK(self._collect)  # must be kept: the library holds only the address
        data = espeakng_loader.get_data_path().encode()
        if self.espeak.espeak_Initialize(self.AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0) != ESPEAK_SAMPLE_RATE:
            raise UserRuntimeError(f"eSpeak did not start with the data in '{data.decode()}'; reinstall espeakng-loader.")
        self.espeak.espeak_SetSynthCallback(self.callback)
        self.espeak.espeak_ng_SetRandSeed(seed)
        if self.espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserRuntimeError(f"eSpeak has no voice '{voice}'; use a language that espeakng-loader contains.")
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.PITCH_RANGE, pitch_range)):
            self.espeak.espeak_SetParameter(parameter, int(value), 0)

    def _collect(self, samples, count, _events):
        """Receives a piece of audio from eSpeak; at the end of the utterance the pointer is null."""
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.espeak.espeak_Terminate()

    def __call__(self, text):
        """Synthesises a text.

        Arguments
        ---------
        text : str
            The text.

        Returns
        -------
        samples : numpy.ndarray
            Shape (samples,), at 22,050 Hz, in the range -1 to 1.
        """
        self.chunks = []
        data = text.encode() + b"\0"
        size = ctypes.c_size_t(len(data))
        self.espeak.espeak_Synth(data, size, 0, self.POS_CHARACTER, 0, self.CHARS_UTF8, None, None)
        self.espeak.espeak_Synchronize()
        return np.concatenate(self.chunks) / 32768
