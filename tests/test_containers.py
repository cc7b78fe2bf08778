"""All containers and codecs of this libsndfile: a file is read whole, or refused with a sentence that states the reason."""

import gzip
import io
import random
import re
import struct
import sys
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from recipes.LibriSpeech.prepare import prepare_librispeech
from speechbrain_ext.cli import stream
from speechbrain_ext.dataio import audio
from speechbrain_ext.dataio.audio import AudioError, check_audio, count_samples, load_audio, read_blocks
from speechbrain_ext.dataio.containers import REVERSED_BITS, container_name, find_parts
from speechbrain_ext.dataio.flac_frames import walk_frames

RATES = (16000, 8000, 44100)  # the first one that a format accepts is used
SECONDS = 1.5
BLOCK = 2400  # largest number of samples that a codec adds or removes at each end
NO_LENGTH = {"IRCAM", "PAF", "PVF", "SD2", "XI"}  # libsndfile writes 0 for the length of XI
NO_HEADER = {"SD2"}  # its header is a separate file


def signal(samples, channels=1, rate=16000):
    """A chirp with a rising envelope, which no shift maps to itself; each channel has a different level."""
    t = np.arange(samples) / rate
    chirp = np.sin(2 * np.pi * (200 * t + 300 * t**2)) * (0.2 + 0.3 * np.sin(2 * t) ** 2)
    return np.stack([chirp / (1 + channel) for channel in range(channels)], axis=1).astype(np.float32)


def write(path, form, subtype, channels):
    """Write the signal at a rate that the format accepts; returns its samples and the stated rate."""
    for rate in RATES:
        try:
            samples = signal(int(SECONDS * rate), channels, rate)
            soundfile.write(path, samples, rate, format=form, subtype=subtype)
            # WVE always has 8000 Hz, XI 44100
            return samples.mean(axis=1), rate if form == "RAW" else soundfile.info(path).samplerate
        except soundfile.SoundFileError:
            path.unlink(missing_ok=True)
    return None, None


def agrees(wav, expected):
    """Whether samples equal the written ones, apart from the padding and loss of the codec."""
    wav, expected = np.asarray(wav, np.float64), np.asarray(expected, np.float64)
    if not len(expected) - 1 <= len(wav) <= len(expected) + BLOCK:
        return False
    n = 1 << (len(wav) + len(expected)).bit_length()
    cross = np.fft.irfft(np.fft.rfft(wav, n) * np.conj(np.fft.rfft(expected, n)), n)
    shifts = np.r_[cross[:BLOCK], cross[-BLOCK:]]
    return shifts.max() > 0.9 * np.linalg.norm(wav) * np.linalg.norm(expected)


def outcome(path, expected, may_add=0):
    """``whole`` or ``refused``; fails if only a part of a file, or other samples, are read without an error."""
    try:
        wav = load_audio(path)
    except AudioError as error:
        sentence = str(error)
        assert str(path) in sentence and sentence.endswith(".") and "\n" not in sentence
        assert ". " not in sentence.replace(str(path), "")
        for function in (check_audio, lambda path: list(read_blocks(path, 0.3))):
            with pytest.raises(AudioError) as again:
                function(path)
            assert str(again.value) == sentence
        return "refused", error
    samples = wav.numpy()
    if may_add:
        assert len(samples) <= len(expected) + may_add + 1
        samples = samples[: len(expected)]
    assert agrees(samples, expected), (len(samples), len(expected))
    info = check_audio(path)
    assert count_samples(path) == len(wav) == -(-info.num_frames * 16000 // info.sample_rate)
    assert torch.equal(torch.cat(list(read_blocks(path, 0.3))), wav) or info.sample_rate != 16000
    start = len(wav) // 2 + 7
    assert torch.allclose(torch.cat(list(read_blocks(path, 0.3, start))), wav[start:], atol=1e-6)
    return "whole", None


MATRIX = Counter()


@pytest.fixture(scope="module", autouse=True)
def matrix():
    """With -s, print how many files of each format were whole or refused in each case."""
    yield
    cases = list(dict.fromkeys(case for _, case, _ in MATRIX))
    print("\n" + "\t".join(["format", *cases]))
    for form in dict.fromkeys(form for form, _, _ in MATRIX):
        cells = (f"{MATRIX[form, case, 'whole']}/{MATRIX[form, case, 'refused']}" for case in cases)
        print("\t".join([form, *cells]))


@pytest.mark.parametrize("form", soundfile.available_formats())
def test_every_container_is_read_whole_or_refused(form, tmp_path):
    generator = random.Random(form)
    junk = b"\x07" + generator.randbytes(63)
    path = tmp_path / f"a.{form.lower()}"
    written = 0
    for subtype in soundfile.available_subtypes(form):
        for channels in (1, 2):
            one, rate = write(path, form, subtype, channels)
            if one is None:
                continue
            written += 1
            expected = audio.resample(one, rate)
            twice = audio.resample(np.concatenate((one, one)), rate)
            data = path.read_bytes()

            def record(case, change, expected, wanted, may_add=0, form=form, subtype=subtype, path=path):
                path.write_bytes(change)
                result, error = outcome(path, expected, may_add)
                MATRIX[form, case, result] += 1
                assert result in wanted, (subtype, case, error)
                return error

            whole, refused = ("whole",), ("refused",)
            if form == "RAW":  # without a header, the name is not trusted
                assert record("whole", data, expected, refused).reason in ("unreadable", "truncated or damaged")
                continue
            record("whole", data, expected, whole)
            for case, place in (
                ("cut in header", 10 if form == "PVF" else 30),
                ("cut in half", len(data) // 2 - 1),
                ("cut at the end", len(data) - 5),
            ):
                if form in NO_LENGTH:  # excluded, because no header shows it; but no part of a sample is read
                    width = {"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DPCM_16": 2}.get(subtype, 1)
                    if form in NO_HEADER:
                        continue
                    if case == "cut in header":
                        record(case, data[:place], expected, refused)
                    elif form != "XI" and width * channels > 1 and (len(data) - place) % (width * channels):
                        record(case, data[:place], expected, refused)
                    continue
                error = record(case, data[:place], expected, refused)
                assert error.reason in ("truncated or damaged", "unreadable"), error
            if form not in NO_HEADER:
                error = record("twice", 2 * data, twice, whole if form in ("FLAC", "MP3", "OGG") else refused)
                assert error is None or error.reason in ("joined", "unfinished"), error
            for case, tail in (("junk after", junk), ("zeros after", bytes(64)), ("ID3v1 after", b"TAG" + b"title".ljust(125))):
                adds = 16000 * len(tail) // rate if form in NO_LENGTH else 0  # read as samples: excluded
                record(case, data + tail, expected, ("whole", "refused") if form in NO_LENGTH else whole, adds)
            if form not in NO_HEADER:
                record("junk before", junk + data, expected, whole if form == "MP3" else refused)
            path.unlink()
    assert written


# -------------------- joined files, and lengths that no header states


def encode(form="WAV", samples=24000, channels=1, rate=16000, **options):
    file = io.BytesIO()
    soundfile.write(file, signal(samples, channels, rate), rate, format=form, **options)
    return file.getvalue()


def without_xing(mp3):
    """An MP3 file without its first frame, which has no samples and states the length."""
    mark = max(mp3.find(b"Xing"), mp3.find(b"Info"))
    first = mp3.rindex(b"\xff", 0, mark)
    return mp3[mp3.index(mp3[first : first + 2], mark) :]


def variable_mp3():
    """Loud noise, then near silence: the first frames are much larger than the others, so the estimated length is wrong."""
    noise = np.convolve(np.random.default_rng(0).standard_normal(10 * 16000), np.ones(6) / 6, "same")  # within the codec's band
    noise[2 * 16000 :] *= 1e-4
    noise += 0.3 * signal(len(noise))[:, 0]
    noise[2 * 16000 :] = signal(8 * 16000)[:, 0] * 0.5
    file = io.BytesIO()
    soundfile.write(file, 0.2 * noise, 16000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    return file.getvalue(), (0.2 * noise).astype(np.float32)


def test_a_variable_mp3_without_a_header_is_read_whole(tmp_path):
    data, samples = variable_mp3()
    path = tmp_path / "a.mp3"
    path.write_bytes(without_xing(data))
    with soundfile.SoundFile(path) as file:
        assert file.frames < 0.9 * len(samples)  # libsndfile would stop here
    assert outcome(path, samples) == ("whole", None)
    path.write_bytes(without_xing(data)[:-3])
    assert outcome(path, samples)[1].reason == "truncated or damaged"
    path.write_bytes(data[: len(data) // 2])
    assert "MPEG frame" in str(outcome(path, samples)[1])


@pytest.mark.parametrize("layer, size, samples", [(0xFF, (12 * 192000 // 48000) * 4, 384), (0xFD, 144 * 128000 // 48000, 1152)])
def test_mpeg_layers_one_and_two_are_counted(layer, size, samples, tmp_path):
    small = bytes([0xFF, layer, 0x64 if layer == 0xFF else 0x84, 0xC0]).ljust(size, b"\0")
    large = bytes([0xFF, layer, 0xE4, 0xC0]).ljust((12 * 448000 // 48000) * 4 if layer == 0xFF else 144 * 384000 // 48000, b"\0")
    path = tmp_path / "a.mp2"
    path.write_bytes(10 * large + 100 * small)
    assert count_samples(path, 48000) == len(load_audio(path, 48000)) == check_audio(path).num_frames == 110 * samples


def test_an_mp3_whose_header_states_less_than_it_holds_is_read_whole(tmp_path):
    path, mp3 = tmp_path / "a.mp3", encode("MP3")
    path.write_bytes(mp3 + without_xing(mp3))
    wav = load_audio(path)
    assert 48000 <= len(wav) <= 48000 + 2 * BLOCK and count_samples(path) == len(wav)
    damaged = bytearray(path.read_bytes())
    del damaged[-500:-470]
    path.write_bytes(damaged)
    with pytest.raises(AudioError, match="are no MPEG frames, but frames follow"):
        load_audio(path)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_is_read_whole(subtype, tmp_path):
    first, second = encode("OGG", subtype=subtype), encode("OGG", 16000, subtype=subtype)
    path = tmp_path / "a.ogg"
    path.write_bytes(first + second + first)
    expected = np.concatenate([signal(n)[:, 0] for n in (24000, 16000, 24000)])
    assert outcome(path, expected) == ("whole", None)
    path.write_bytes(first + second[:-40] + first)
    assert outcome(path, expected)[1].reason == "truncated or damaged"
    path.write_bytes(first + bytes(50) + second)
    assert outcome(path, expected)[1].reason == "joined"


@pytest.mark.parametrize("form", ["FLAC", "MP3", "OGG"])
def test_joined_parts_may_differ_in_channels_but_not_in_rate(form, tmp_path):
    path = tmp_path / f"a.{form.lower()}"
    path.write_bytes(encode(form) + encode(form, channels=2))
    expected = np.concatenate([signal(24000)[:, 0], signal(24000, 2).mean(axis=1)])
    assert outcome(path, expected) == ("whole", None)
    path.write_bytes(encode(form) + encode(form, rate=48000))
    assert "16000 and 48000 samples per second" in str(outcome(path, expected)[1])


def flac_frames(flac):
    """The positions of the frames of a FLAC file, and the end of the last one."""
    found = [match.start() for match in re.finditer(rb"\xff\xf8", flac)]
    return [place for number, place in enumerate(found) if flac[place + 4] == number] + [len(flac)]


def with_total(flac, samples):
    """A FLAC file with another number of samples in its header, in the last 36 bits of 26 bytes."""
    return flac[:21] + bytes([flac[21] & 0xF0 | samples >> 32]) + (samples & 0xFFFFFFFF).to_bytes(4, "big") + flac[26:]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda flac, _: with_total(flac, 8000), "is unfinished: its FLAC header states 8000 samples, and its frames hold 24000"),
        (lambda flac, _: with_total(flac, 16384), "is unfinished: its FLAC header states 16384 samples"),
        (lambda flac, _: with_total(flac, 30000), "its FLAC header states 30000 samples, and its frames hold 24000"),
        (lambda flac, at: flac[: at[1]] + flac[at[3] :], "is not the one that should follow"),
        (lambda flac, at: flac[: at[3]] + flac[at[1] :], "is not the one that should follow"),
        (lambda flac, at: flac[: at[1]], "its frames hold 4096"),
        (lambda flac, at: flac[: at[0]] + b"\0" + flac[at[0] :], "no frame follows its FLAC header"),
        (lambda flac, _: flac[:-40] + bytes([flac[-40] ^ 1]) + flac[-39:], "does not end with the right checksum"),
        (lambda flac, _: flac + encode(), "holds more than one file: the header of another WAV file"),
        (lambda flac, _: flac + encode("OGG"), "holds more than one file: the header of another Ogg file"),
        (lambda flac, _: flac + b"\7" * 2000, "bytes that are no tags follow it"),
    ],
)
@pytest.mark.parametrize("place", ["alone", "in front of another"])
def test_a_flac_whose_frames_are_not_those_of_its_header_is_refused(change, message, place, tmp_path):
    """libsndfile would read as many samples as the header states, with silence for missing frames."""
    flac = encode("FLAC", subtype="PCM_16")
    (tmp_path / "a.flac").write_bytes(change(flac, flac_frames(flac)) + (b"" if place == "alone" else flac))
    with pytest.raises(AudioError, match=message) as refused:
        load_audio(tmp_path / "a.flac")
    with pytest.raises(AudioError, match=re.escape(str(refused.value))):
        check_audio(tmp_path / "a.flac")


@pytest.mark.parametrize("subtype", soundfile.available_subtypes("FLAC"))
@pytest.mark.parametrize("rate", [1000, 8001, 16000, 44100, 192_000, 655_350])
def test_the_frames_of_flac_are_found(subtype, rate):
    """All forms of frame headers, and samples that look like one: -8 is 0xFFF8."""
    generator = np.random.default_rng(0)
    for channels, samples in ((1, 1), (1, 4096), (2, 4097), (8, 20_000)):
        for wav in (0.3 * generator.standard_normal((samples, channels)), generator.integers(-9, 9, (samples, channels)) / 2**15):
            file = io.BytesIO()
            soundfile.write(file, wav.clip(-0.9, 0.9), rate, format="FLAC", subtype=subtype)
            size = file.seek(0, 2)
            found = walk_frames(file, 0, size)
            assert (found.stated, found.held, found.gap) == (samples, samples, None) and size in found.ends


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_last_page_of_ogg_that_takes_samples_back_is_refused(subtype, tmp_path):
    ogg = encode("OGG", samples=480_000, subtype=subtype)
    last = ogg.rindex(b"OggS")
    for samples, message in (
        (8000, "states that it ends at sample 8000, and the page before"),
        (-1, "no packet ends on its last"),
    ):
        page = ogg[last : last + 6] + samples.to_bytes(8, "little", signed=True) + ogg[last + 14 : last + 22]
        page += bytes(4) + ogg[last + 26 :]
        checksum = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
        page = page[:22] + checksum.to_bytes(4, "big").translate(REVERSED_BITS) + page[26:]
        (tmp_path / "a.ogg").write_bytes(ogg[:last] + page)
        with pytest.raises(AudioError, match=message):
            load_audio(tmp_path / "a.ogg")


def test_a_cut_part_of_a_joined_flac_is_refused(tmp_path):
    path, flac = tmp_path / "a.flac", encode("FLAC")
    path.write_bytes(flac[: len(flac) // 2] + flac)
    assert outcome(path, signal(48000)[:, 0])[1].reason == "truncated or damaged"


def tags():
    """All kinds of tags at the end of a file, by name."""
    id3v1 = b"TAG" + b"title".ljust(125)
    items = b"\5\0\0\0\0\0\0\0Title\0hello"
    head, foot, old = (
        b"APETAGEX" + struct.pack("<4I8x", version, len(items) + 32, 1, flags)
        for version, flags in ((2000, 0xA0000000), (2000, 0x80000000), (1000, 0))
    )
    lyrics = b"LYRICSBEGININD0000200LYR00005hello"
    return {
        "ID3v1": id3v1,
        "TAG+": b"TAG+" + bytes(223) + id3v1,
        "APE": head + items + foot,
        "APE without a header": items + old,
        "Lyrics3": b"LYRICSBEGINhello worldLYRICSEND" + id3v1,
        "Lyrics3 version 2": lyrics + b"%06dLYRICS200" % len(lyrics) + id3v1,
        "ID3v2": b"ID3\4\0\0\0\0\x10\0" + bytes(2048),
        "several": head + items + foot + id3v1,
    }


@pytest.mark.parametrize("kind", tags())
def test_a_tag_between_joined_files_hides_none(kind, tmp_path):
    path, tag = tmp_path / "a", tags()[kind]
    one, twice = signal(24000)[:, 0], np.concatenate([signal(24000)[:, 0]] * 2)
    for form in ("MP3", "OGG", "FLAC", "WAV", "W64", "AIFF"):
        data = encode(form)
        path.write_bytes(data + tag)
        assert outcome(path, one) == ("whole", None), form
        path.write_bytes(data + tag + data + tag)
        result, error = outcome(path, twice)
        if form in ("MP3", "OGG", "FLAC"):
            assert result == "whole", (form, error)
        else:
            assert error.reason == "joined", (form, error)
    mp3 = encode("MP3")
    frames = without_xing(mp3)
    path.write_bytes(frames + tag + frames)
    assert 48000 <= len(load_audio(path)) <= 48000 + 2 * BLOCK
    path.write_bytes(mp3 + tag + encode("WAV"))
    assert outcome(path, twice)[1].reason == "joined"


def test_samples_that_begin_like_a_tag_are_no_tag(tmp_path):
    path = tmp_path / "a.wav"
    for begin in (b"TAG", b"TAG+", b"APETAGEX", b"LYRICSBEGIN", b"3DI"):
        wav = bytearray(encode())
        struct.pack_into("<I", wav, 40, 16000)  # the header was not updated
        wav[44 + 16000 : 44 + 16000 + len(begin)] = begin
        path.write_bytes(wav)
        assert outcome(path, [])[1].reason == "unfinished", begin


@pytest.mark.parametrize(
    "form, subtype, chunk",
    [
        ("WAV", "PCM_16", b"data"),
        ("W64", "PCM_16", b"data\xf3\xac"),
        ("AIFF", "PCM_16", b"SSND"),
        ("SVX", "PCM_S8", b"BODY"),
        ("SVX", "PCM_16", b"BODY"),
    ],
)
def test_a_second_chunk_of_samples_is_refused(form, subtype, chunk, tmp_path):
    path, data = tmp_path / "a", encode(form, subtype=subtype)
    path.write_bytes(data + data[data.index(chunk) :])
    sentence = str(outcome(path, [])[1])
    assert f"more than one chunk of samples, and soundfile reads only one: another begins at byte {len(data)};" in sentence


def pages(ogg):
    position = 0
    while position < len(ogg):
        end = position + 27 + ogg[position + 26] + sum(ogg[position + 27 : position + 27 + ogg[position + 26]])
        yield ogg[position:end]
        position = end


def test_ogg_streams_of_sound_side_by_side_are_refused(tmp_path):
    path = tmp_path / "a.ogg"
    for subtype in ("VORBIS", "OPUS"):
        (one, *ones), (two, *twos) = pages(encode("OGG", subtype="VORBIS")), pages(encode("OGG", subtype=subtype))
        path.write_bytes(one + two + b"".join(ones + twos))
        assert "several streams of sound side by side" in str(outcome(path, [])[1])


def test_zeros_in_the_place_of_mpeg_frames_are_refused(tmp_path):
    path, mp3, one = tmp_path / "a.mp3", encode("MP3"), signal(24000)[:, 0]
    frames = without_xing(mp3)
    path.write_bytes(frames[: len(frames) // 2].ljust(len(frames), b"\0"))  # a download into a file of the full size
    error = outcome(path, [])[1]
    assert error.reason == "truncated or damaged" and "bytes of zeros follow its last MPEG frame" in str(error)
    path.write_bytes(mp3 + frames[: len(frames) // 2].ljust(len(frames), b"\0"))
    assert outcome(path, [])[1].reason == "truncated or damaged"
    path.write_bytes(mp3 + bytes(9000))  # its header shows that nothing is missing
    assert outcome(path, one) == ("whole", None)
    path.write_bytes(frames + bytes(900))
    assert outcome(path, one) == ("whole", None)


# -------------------- headers that were never finished


def test_a_recorder_that_was_stopped(tmp_path):
    wav, path = bytearray(encode()), tmp_path / "a.wav"
    samples = len(wav) - 44
    struct.pack_into("<I", wav, 4, 0)
    struct.pack_into("<I", wav, 40, 0)
    path.write_bytes(wav)
    sentence = str(outcome(path, [])[1])
    assert f"its header states no samples and {samples} bytes follow" in sentence and "was stopped" in sentence
    struct.pack_into("<I", wav, 40, 3200)  # updated from time to time
    path.write_bytes(wav)
    assert outcome(path, [])[1].reason == "unfinished"
    for size in (0x7FFFFFFF, 0xFFFFFFFF):  # written to a pipe
        struct.pack_into("<I", wav, 40, size)
        path.write_bytes(wav)
        assert outcome(path, signal(24000)[:, 0]) == ("whole", None)
        path.write_bytes(2 * wav)
        assert outcome(path, [])[1].reason == "joined"
    path.write_bytes(encode(samples=0))
    assert outcome(path, [])[1].reason == "empty"
    for form in ("AU", "W64", "CAF", "AIFF"):
        data = bytearray(encode(form))
        if form == "AU":
            struct.pack_into(">I", data, 8, 0)
        elif form == "W64":
            struct.pack_into("<Q", data, data.index(b"data\xf3\xac") + 16, 24)
        elif form == "CAF":
            struct.pack_into(">q", data, data.index(b"data") + 4, 4)
        else:
            struct.pack_into(">I", data, data.index(b"SSND") + 4, 8)
        path.write_bytes(data)
        assert outcome(path, [])[1].reason == "unfinished", form


def test_sizes_as_written_to_a_pipe(tmp_path):
    path, expected = tmp_path / "a", signal(24000)[:, 0]
    largest = {"AIFF": (0xFFFFFFFF, 0x7F000008), "SVX": (0xFFFFFFFF,), "W64": (2**63, 2**63 - 1, 2**64 - 1)}
    for form, sizes in largest.items():
        name, code, file_size = {
            "AIFF": (b"SSND", ">I", 4),
            "SVX": (b"BODY", ">I", 4),
            "W64": (b"data\xf3\xac", "<Q", 16),
        }[form]
        for size in sizes:
            data = bytearray(encode(form, subtype="PCM_16"))
            struct.pack_into(code, data, data.index(name) + file_size, size)
            path.write_bytes(data)
            assert outcome(path, expected) == ("whole", None), (form, size)
            struct.pack_into(code, data, file_size, size)
            path.write_bytes(data)
            assert outcome(path, expected) == ("whole", None), (form, size)
            path.write_bytes(2 * data)
            assert outcome(path, [])[1].reason == "joined", (form, size)


def test_what_soundfile_cannot_read_is_not_called_truncated(tmp_path):
    path = tmp_path / "a"
    nist = encode("NIST").replace(b"sample_coding -s3 pcm\n", b"sample_coding -s26 pcm,embedded-shorten-v2.00\n")
    path.write_bytes(nist[:30000])
    error = outcome(path, [])[1]
    assert error.reason == "unreadable" and "is compressed (pcm,embedded-shorten-v2.00)" in str(error)
    wav = encode()
    listed = b"LIST" + struct.pack("<I", 4 + len(wav) - 36) + b"wavl" + wav[36:]
    path.write_bytes(wav[:4] + struct.pack("<I", 28 + len(listed)) + wav[8:36] + listed)
    error = outcome(path, [])[1]
    assert error.reason == "unreadable" and "in a list of chunks (wavl)" in str(error)


def test_chunks_and_tags_around_the_samples_are_left_out(tmp_path):
    path, expected = tmp_path / "a.wav", signal(24000)[:, 0]
    id3 = b"ID3\4\0\0\0\0\x10\0" + bytes(2048)
    chunks = b"LIST" + struct.pack("<I", 5001) + bytes(5002) + b"bext" + struct.pack("<I", 4000) + b"x" * 4000
    for form in ("WAV", "W64", "AIFF"):
        for data in (id3 + encode(form), encode(form) + id3 + b"APETAGEX" + bytes(3000), encode(form) + bytes(9000)):
            path.write_bytes(data)
            assert outcome(path, expected) == ("whole", None), form
    path.write_bytes(encode("WAV") + chunks)
    assert outcome(path, expected) == ("whole", None)
    odd = encode("WAV", 23999, subtype="PCM_U8")
    for data in (odd[:-1], odd):  # an odd number of bytes, without and with its padding
        path.write_bytes(data + chunks)
        assert outcome(path, expected[:23999]) == ("whole", None)
    path.write_bytes((id3 + encode("WAV"))[:-200])
    assert outcome(path, expected)[1].reason == "truncated or damaged"
    for form in ("MP3", "WAV", "FLAC"):
        path.write_bytes(encode(form) + id3)
        assert outcome(path, expected) == ("whole", None), form
    path.write_bytes(id3)
    assert outcome(path, expected)[1].reason == "unreadable"
    path.write_bytes(id3[:500])
    assert "ends within the ID3 tag" in str(outcome(path, expected)[1])


def test_mp3_frames_in_a_wav(tmp_path):
    mp3, path = without_xing(encode("MP3")), tmp_path / "a.wav"
    format_chunk = struct.pack("<4sIHHIIHHHHIHHH", b"fmt ", 30, 0x55, 1, 16000, 4000, 1, 0, 12, 1, 2, 144, 1, 0)
    body = b"WAVE" + format_chunk + b"data" + struct.pack("<I", len(mp3)) + mp3
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert outcome(path, signal(24000)[:, 0]) == ("whole", None)
    path.write_bytes(path.read_bytes()[:-1000])
    assert outcome(path, [])[1].reason == "truncated or damaged"


def test_names_prove_nothing(tmp_path):
    for suffix in ("gsm", "vox", "au", "snd", "raw", "mp3", "sd2", "wav"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(b"no audio\n" * 990)
        assert outcome(path, [])[0] == "refused"
    soundfile.write(path, signal(12000, rate=8000), 8000, format="RAW", subtype="GSM610")
    path.rename(tmp_path / "b.gsm")  # its frames can be recognised
    assert len(load_audio(tmp_path / "b.gsm")) == 24000
    (tmp_path / "b.gsm").write_bytes((tmp_path / "b.gsm").read_bytes()[:-1])
    assert outcome(tmp_path / "b.gsm", [])[1].reason == "truncated or damaged"
    path = tmp_path / "a.txt"
    path.write_bytes("UTF-16, whose first two bytes begin a frame".encode("utf-16"))
    assert "or no audio" in str(outcome(path, [])[1])


# -------------------- any bytes


def test_no_bytes_raise_anything_else(tmp_path):
    generator, path = random.Random(0), tmp_path / "a"
    wholes = [encode(form, 800) for form in ("WAV", "RF64", "W64", "AIFF", "CAF", "AU", "NIST", "VOC", "FLAC", "OGG", "MP3")]
    wholes += [encode(form, 800) for form in ("AVR", "MAT4", "MAT5", "HTK", "PVF", "PAF", "IRCAM", "SVX", "SDS", "MPC2K")]
    wholes += [encode("WAV", 800, subtype=subtype) for subtype in ("GSM610", "IMA_ADPCM", "MS_ADPCM")]
    for index in range(400):
        data = bytearray(wholes[index % len(wholes)])
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(min(len(data), 120))] = generator.randrange(256)
        path.write_bytes(data[: generator.randrange(len(data))] if index % 3 == 0 else data)
        for function in (load_audio, check_audio, count_samples, lambda path: list(read_blocks(path, start=300))):
            try:
                function(path)
            except AudioError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("no reason"), MemoryError(), KeyError("x")])
def test_whatever_decoding_raises_names_the_file(error, monkeypatch, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encode())

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    for function in (load_audio, check_audio, lambda path: list(read_blocks(path))):
        with pytest.raises(AudioError, match=f"a.wav cannot be decoded: .*{re.escape(audio._words(error))}"):
            function(path)


def test_a_read_error_under_a_part_of_a_file_is_named(monkeypatch, tmp_path):
    path = tmp_path / "a.flac"
    path.write_bytes(2 * encode("FLAC"))
    recording = audio._Recording(path)
    file = recording._open(recording._parts[0])
    monkeypatch.setattr(audio._SoundFile, "read", lambda *_: setattr(file.source, "error", OSError(5, "broken")) or signal(3))
    with pytest.raises(AudioError, match="cannot be decoded: broken"):
        recording._call(file, file.read)
    file.close()


def failing_read(self, *arguments, **options):
    with open(self.name, "rb") as file:
        if b"FAIL" in file.read():
            raise RuntimeError("decoder gone")
    return REAL_READ(self, *arguments, **options)


REAL_READ = soundfile.SoundFile.read


def test_one_bad_file_never_ends_a_preparation(monkeypatch, tmp_path):
    folder = tmp_path / "corpus" / "train" / "1" / "2"
    folder.mkdir(parents=True)
    for n in range(40):
        (folder / f"1-2-{n}.wav").write_bytes(encode(samples=16000, rate=8000))
    (folder / "1-2-3.wav").write_bytes(encode(samples=16000, rate=8000, subtype="GSM610"))
    (folder / "1-2-4.wav").write_bytes(encode(samples=16000, rate=8000, subtype="G721_32"))
    (folder / "1-2-5.wav").write_bytes(encode(samples=16000, rate=8000) + b"LIST\4\0\0\0FAIL")
    (folder / "1-2-6.wav").write_bytes(2 * encode(samples=16000, rate=8000))
    (folder / "1-2.trans.txt").write_text("".join(f"1-2-{n} HELLO\n" for n in range(40)))
    monkeypatch.setattr(soundfile.SoundFile, "read", failing_read)
    prepare_librispeech(tmp_path / "corpus", tmp_path / "save", tr_splits=["train"])
    rows = (tmp_path / "save" / "train.csv").read_text().splitlines()
    skipped = (tmp_path / "save" / "skipped.csv").read_text()
    assert len(rows) == 39 and "1-2-3" in "".join(rows) and "1-2-4" in "".join(rows)
    assert "decoder gone" in skipped and "1-2-5.wav" in skipped and "joined" in skipped and "1-2-6.wav" in skipped


# -------------------- standard input


def arguments(file="-"):
    return SimpleNamespace(file=str(file), sample_rate=16000)


@pytest.mark.parametrize("form", sorted(set(soundfile.available_formats()) - {"RAW", "SD2", "HTK", "MPC2K", "SDS"}))
def test_a_file_on_standard_input_is_refused(form, monkeypatch, tmp_path):
    path = tmp_path / "a"
    write(path, form, soundfile.default_subtype(form), 1)
    for size in (1, 7, 5000):  # bytes per read
        raw = io.BytesIO(path.read_bytes())
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read1=lambda n, raw=raw, s=size: raw.read(s))))
        with pytest.raises(AudioError, match="Standard input begins like a file in .* format") as error:
            list(stream._pieces(arguments(), 16000))
        assert "give the file's name instead of -" in str(error.value)


def adts(size):
    return bytes([0xFF, 0xF1, 0x60, 0x40 | size >> 11, size >> 3 & 255, (size & 7) << 5 | 0x1F, 0xFC]).ljust(size, b"\x21")


FOREIGN = {
    "AVI": b"RIFF\x24\x10\0\0AVI LIST",
    "ASF or WMA": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"),
    "AAC": adts(371) + adts(402),
    "WavPack": b"wvpk\x60\x03\0\0\x10\x04",
    "Monkey's Audio": b"MAC \x96\x0f\0\0",
    "gzip": gzip.compress(bytes(9)),
    "zip": b"PK\3\4\x14\0\0\0\x08\0",
    "MPEG-TS": 9 * (b"G\x40\x11\x10" + bytes(184)),
    "MPEG-PS": b"\0\0\1\xba\x44\0\4\0\4\1",
    "FLV": b"FLV\1\5\0\0\0\x09",
    "TTA": b"TTA1\1\0\1\0\x10\0",
    "DSD": b"DSD \x1c\0\0\0",
    "SoX": b".SoX\x1c\0\0\0",
    "Shorten": b"ajkg\2\xfb\xb1",
    "MP4": b"\0\0\0\x1cftypM4A ",
    "HTML": b"\n<!DOCTYPE html>\n<title>404</title>\n" * 3,
    "text": "Größe: no samples, but words.\n".encode() * 9,
    "UTF-16 text": "no samples, but words\n".encode("utf-16"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_audio_on_standard_input_is_refused(name, monkeypatch):
    noise = b"" if "text" in name or name == "HTML" else np.random.default_rng(0).bytes(20000)
    for size in (1, 7, 5000):
        raw = io.BytesIO(FOREIGN[name] + noise)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read1=lambda n, raw=raw, s=size: raw.read(s))))
        with pytest.raises(AudioError, match=f"Standard input begins like a file in {name} format") as error:
            list(stream._pieces(arguments(), 16000))
        assert "give the file's name" not in str(error.value)  # soundfile cannot read the file either


def test_raw_samples_on_standard_input_are_taken(monkeypatch):
    raw = (signal(16000)[:, 0] * 32767).astype("<i2").tobytes()
    likenesses = b"\xff\xfb\x90\x64", b"\xff\xf1\x60\x40", b"\x01\x04", b"\0\0", b"ID3", b"RIFF", b"MZ", b"Ogg", b"G", b"<p>"
    for head in (b"", *likenesses):
        data = head + raw
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))
        wav = torch.cat(list(stream._pieces(arguments(), 16000))).numpy()
        assert np.array_equal(wav, np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / 32768)


def test_random_samples_look_like_no_file():
    generator = np.random.default_rng(0)
    for level in (3, 100, 32767):
        for _ in range(3000):
            assert container_name(generator.integers(-level, level, 1024).astype("<i2").tobytes()) == ""


def test_text_looks_like_text():
    for encoding in ("utf-8", "utf-8-sig", "latin-1"):
        for text in ("Größe: words, no samples.\n", "hello", "MAC addresses ", "\t1,2\r\n"):
            assert container_name((4 * text).encode(encoding)) == "text"
    assert container_name(30 * "日本語".encode()) == "text"
    assert container_name(b"ab") == container_name(b"words\0") == ""


def test_parts_of_a_file_cover_it(tmp_path):
    path = tmp_path / "a.flac"
    path.write_bytes(3 * encode("FLAC"))
    parts = find_parts(path)
    assert len(parts) == 3 and parts[0].begin == 0 and parts[-1].end == path.stat().st_size
    assert all(one.end == two.begin for one, two in zip(parts, parts[1:], strict=False))
