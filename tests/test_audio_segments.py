"""Segments of audio files, and files inside other files: the same samples, without reading the rest."""

import io
import tarfile

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_ext.dataio import audio
from speechbrain_ext.dataio.audio import AudioError, check_audio, count_samples, load_audio

RATE = 16000
KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAV", "MS_ADPCM"),
    ("WAV", "GSM610"),
    ("AU", "G721_32"),
    ("AIFF", "PCM_24"),
    ("CAF", "ALAC_16"),
    ("NIST", "PCM_16"),
    ("W64", "PCM_16"),
    ("RF64", "PCM_16"),
    ("VOC", "PCM_16"),
    ("PAF", "PCM_24"),
    ("SDS", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


def tolerance(kind):
    """MP3 may differ in the last bit, and Opus by its noise, much less than at another position."""
    return {"atol": 6e-3 if kind[1] == "OPUS" else 3e-7, "rtol": 0}


def noise(seconds, seed=0):
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return 0.1 * (samples + np.roll(samples, 1))


def write(path, kind, seconds=8.0, seed=0):
    soundfile.write(path, noise(seconds, seed), RATE, format=kind[0], subtype=kind[1])
    return path


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_a_segment_has_the_samples_of_the_whole(kind, tmp_path):
    path = write(tmp_path / "a", kind)
    whole = load_audio(path)
    for start, stop in ((0, 1), (0, 8000), (8000, 8001), (31_111, 64_000), (100_003, len(whole)), (len(whole) - 1, len(whole))):
        torch.testing.assert_close(load_audio(path, RATE, start, stop), whole[start:stop], **tolerance(kind))
    torch.testing.assert_close(load_audio(path, RATE, 100_003), whole[100_003:], **tolerance(kind))


@pytest.mark.parametrize(
    "kind", [("FLAC", "PCM_16"), ("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")], ids=" ".join
)
def test_segments_of_joined_files(kind, tmp_path):
    parts = [write(tmp_path / f"{seed}", kind, 3 + seed, seed).read_bytes() for seed in range(3)]
    (tmp_path / "joined").write_bytes(b"".join(parts))
    whole = load_audio(tmp_path / "joined")
    boundary = len(load_audio(tmp_path / "0"))
    for start, stop in ((1000, 9000), (boundary - 5000, boundary + 5000), (boundary, boundary + 1), (100, len(whole))):
        torch.testing.assert_close(load_audio(tmp_path / "joined", RATE, start, stop), whole[start:stop], **tolerance(kind))


def test_an_mp3_without_a_header_of_its_length(tmp_path):
    data = write(tmp_path / "a.mp3", ("MP3", "MPEG_LAYER_III"), 20).read_bytes()
    path = tmp_path / "b.mp3"
    path.write_bytes(data[data.index(data[:2], 10) :])  # the header is a separate frame
    whole = load_audio(path)
    torch.testing.assert_close(load_audio(path, RATE, 200_000, 216_000), whole[200_000:216_000], atol=3e-7, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in (KINDS[0], *KINDS[-4:]) if kind[1] != "VORBIS"], ids=" ".join)
def test_of_a_long_file_only_the_segment_is_decoded(kind, tmp_path, monkeypatch):
    path = write(tmp_path / "long", kind, 60)
    read, decoded, walked = soundfile.SoundFile.read, [], []

    def counted(self, *arguments):
        samples = read(self, *arguments)
        decoded.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    monkeypatch.setattr(audio, "find_parts", lambda *given, walk=audio.find_parts: walked.append(given) or walk(*given))
    for second in range(45, 55):
        assert len(load_audio(path, RATE, second * RATE, (second + 1) * RATE)) == RATE
    assert sum(decoded) <= 10 * 1.6 * RATE
    assert len(walked) == (kind[0] == "MP3")  # MP3 frames state no length; walked over once, not ten times


def test_the_last_page_of_vorbis(tmp_path):
    """The last page ends early, and libsndfile places its start too early."""
    soundfile.write(tmp_path / "a.ogg", noise(90) * (np.arange(90 * RATE) < 80 * RATE), RATE, format="OGG", subtype="VORBIS")
    whole = load_audio(tmp_path / "a.ogg")
    for start in range(60 * RATE, 90 * RATE - 10, 31_111):
        assert torch.equal(load_audio(tmp_path / "a.ogg", RATE, start, start + 10), whole[start : start + 10])


def test_a_segment_is_resampled_as_a_file_of_its_own(tmp_path):
    samples = noise(4)
    soundfile.write(tmp_path / "whole.wav", samples, 44_100, subtype="FLOAT")
    soundfile.write(tmp_path / "cut.wav", samples[10_001:30_007], 44_100, subtype="FLOAT")
    assert torch.equal(load_audio(tmp_path / "whole.wav", RATE, 10_001, 30_007), load_audio(tmp_path / "cut.wav", RATE))


def test_one_channel_of_several(tmp_path):
    left, right = noise(1, 1), noise(1, 2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="DOUBLE")
    for channel, samples in enumerate((left, right)):
        expected = torch.from_numpy(samples).float()
        assert torch.equal(load_audio(tmp_path / "a.wav", channel=channel), expected)
        assert torch.equal(load_audio(tmp_path / "a.wav", RATE, 100, 200, channel), expected[100:200])
    for channel in (2, -1):
        with pytest.raises(AudioError, match=f"a.wav has 2 channels and no channel {channel}; the first one is 0"):
            load_audio(tmp_path / "a.wav", channel=channel)


def test_channels_that_cancel_each_other_out_are_told(tmp_path, caplog):
    left = noise(1, 1)
    for name, right in (("same", left), ("other", noise(1, 2)), ("silent", 0 * left), ("inverted", -left)):
        soundfile.write(tmp_path / f"{name}.wav", np.stack([left, right], axis=1), RATE)
        load_audio(tmp_path / f"{name}.wav")
        assert (f"The channels of {tmp_path / name}.wav cancel each other out" in caplog.text) == (name == "inverted")
    caplog.clear()
    load_audio(tmp_path / "inverted.wav", channel=0)
    assert not caplog.text


@pytest.mark.parametrize("start, stop", [(0, 16_001), (16_000, 16_000), (500, 400), (20_000, 30_000)])
def test_a_segment_that_is_not_in_the_file_is_refused(start, stop, tmp_path):
    write(tmp_path / "a.flac", ("FLAC", "PCM_16"), 1)
    with pytest.raises(AudioError, match=f"a.flac has 16000 samples, and none from {start} up to {stop}"):
        load_audio(tmp_path / "a.flac", RATE, start, stop)


@pytest.mark.parametrize(
    "kind", [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")], ids=" ".join
)
def test_members_of_a_tar_file_are_files(kind, tmp_path):
    files = [write(tmp_path / f"{seed}.x", kind, 2 + seed, seed) for seed in range(3)]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
    with tarfile.open(tmp_path / "shard.tar") as tar:
        places = [f"{tmp_path}/shard.tar?offset={member.offset_data}&size={member.size}" for member in tar]
    for file, place in zip(files, places, strict=True):
        assert check_audio(place) == check_audio(file) and count_samples(place) == count_samples(file)
        assert torch.equal(load_audio(place), load_audio(file))
        assert torch.equal(load_audio(place, RATE, 20_000, 24_000), load_audio(file, RATE, 20_000, 24_000))
    with pytest.raises(AudioError, match="damaged"):
        check_audio(f"{tmp_path}/shard.tar?offset=1536&size=2000")


def test_a_place_outside_of_a_file_is_refused(tmp_path):
    write(tmp_path / "a.wav", ("WAV", "PCM_16"), 1)
    with pytest.raises(AudioError, match=r"a.wav\?offset=44&size=99999 is truncated or damaged: the file has only 32044 bytes"):
        load_audio(f"{tmp_path}/a.wav?offset=44&size=99999")
    with pytest.raises(AudioError, match=f"There is no audio file {tmp_path}/b.tar; check the path"):
        load_audio(f"{tmp_path}/b.tar?offset=0&size=10")
    with pytest.raises(AudioError, match="size=0 is empty"):
        load_audio(f"{tmp_path}/a.wav?offset=0&size=0")


def test_a_file_whose_name_looks_like_a_place_is_itself(tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(1), RATE, format="WAV")
    (tmp_path / "a?offset=1&size=2").write_bytes(buffer.getvalue())
    assert len(load_audio(f"{tmp_path}/a?offset=1&size=2")) == RATE


def test_a_file_that_was_cut_after_it_was_checked(tmp_path):
    path = write(tmp_path / "a.flac", ("FLAC", "PCM_16"), 4)
    load_audio(path, RATE, 40_000, 48_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match="truncated or damaged"):
        load_audio(path, RATE, 40_000, 48_000)
    path.unlink()
    with pytest.raises(AudioError, match="There is no audio file"):
        load_audio(path, RATE, 40_000, 48_000)
