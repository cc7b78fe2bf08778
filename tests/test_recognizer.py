"""Segments of streams and long files: words do not change later, do not depend on the pieces, and interrupted runs continue."""

import io
import json
import os
import random
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from sentencepiece import SentencePieceProcessor
from test_streaming import speech
from tiny import SMALL_TRANSDUCER, make_model, talkative

from speechbrain_ext import cli
from speechbrain_ext.decoders.alignment import FRAME_SECONDS, Segment, Word, align, confidence_of
from speechbrain_ext.inference import load_model, long_audio
from speechbrain_ext.inference import transcribe as files_to_text
from speechbrain_ext.inference.long_audio import SegmentFile, settings_of, transcribe_long
from speechbrain_ext.inference.models import TransducerModel
from speechbrain_ext.inference.segments import Segmenter
from speechbrain_ext.inference.streaming import StreamingRecognizer
from speechbrain_ext.inference.subtitles import subtitles
from speechbrain_ext.utils.errors import UserError

PIECES = ["<unk>", "▁", "▁THE", "▁CAT", "S", "▁A", "T"]


class Tokenizer:
    """A simple replacement of SentencePiece."""

    @staticmethod
    def id_to_piece(token):
        return PIECES[token]

    @staticmethod
    def decode_ids(tokens):
        return "".join(PIECES[token] for token in tokens).replace("▁", " ")


def log_probs_of(path):
    return torch.eye(len(PIECES))[path].mul(8).log_softmax(-1)


THE, CAT, S, A, T = 2, 3, 4, 5, 6
PAUSE = [0] * 20


def said(segments):
    return [(segment.text, round(segment.start / FRAME_SECONDS), round(segment.end / FRAME_SECONDS)) for segment in segments]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_pauses_end_segments_wherever_the_pieces_end(size):
    path = [0, THE, 0, CAT, CAT, 0, S, *PAUSE, A, *PAUSE, *PAUSE, *PAUSE, T]
    segmenter, segments = Segmenter(Tokenizer), []
    for start in range(0, len(path), size):
        segments += segmenter.accept(log_probs_of(path[start : start + size]))
    segments += segmenter.finish()
    assert said(segments) == [("THE CATS", 1, 7), ("A", 27, 28), ("T", 88, 89)]
    assert [word.text for word in segments[0].words] == ["THE", "CATS"]
    assert segments[0].words[1] == Word("CATS", 0.12, 0.28, segments[0].words[1].confidence) and segments[0].confidence > 0.9
    assert segments[0].confidence == confidence_of(segments[0].words)  # as of segments that are split


def test_what_is_stable_stays():
    generator = random.Random(0)
    for _ in range(20):
        path = [generator.choice([0, 0, 0, 1, 2, 3, 4, 5, 6]) for _ in range(200)]
        segmenter, shown, final = Segmenter(Tokenizer, endpoint=0.2, longest=2.0), "", ""
        for start in range(0, len(path), 5):
            ended = segmenter.accept(log_probs_of(path[start : start + 5]))
            final += "".join(f"{segment.text} " for segment in ended)
            now = final + segmenter.stable_text
            assert now.startswith(shown.strip()) and (final + segmenter.text).startswith(now.strip())
            shown = now
        final += "".join(segment.text for segment in segmenter.finish())
        assert final.startswith(shown.strip())


def test_speech_without_a_pause_ends_at_a_word():
    path = ([THE, 0, CAT, 0, 0, S, S, 0, A, T] * 12)[:100]
    segmenter = Segmenter(Tokenizer, longest=2.0)
    segments = segmenter.accept(log_probs_of(path)) + segmenter.finish()
    piecewise = Segmenter(Tokenizer, longest=2.0)
    pieces = [segment for token in path for segment in piecewise.accept(log_probs_of([token]))] + piecewise.finish()
    assert said(pieces) == said(segments)
    assert len(segments) > 1 and all(segment.end - segment.start <= 2.1 for segment in segments)
    assert " ".join(segment.text for segment in segments) == " ".join(["THE CATS AT"] * 10)


def test_long_silence_is_not_kept():
    segmenter = Segmenter(Tokenizer, search=lambda frames: ([A], log_probs_of([0, A])))
    for _ in range(50):
        assert segmenter.accept(log_probs_of([0] * 100), torch.zeros(100, 4)) == []
    assert segmenter.start > 4900 and sum(map(len, segmenter._log_probs)) < 60


def test_a_second_search_has_the_last_word():
    seen = []

    def search(frames, log_probs):
        seen.append(frames)
        return [A, T], log_probs_of([0] * (len(frames) - 2) + [A, T])

    path = [0] * 5 + [THE, CAT] + PAUSE + PAUSE
    segmenter = Segmenter(Tokenizer, search=search)
    segments = segmenter.accept(log_probs_of(path), torch.arange(len(path)).unsqueeze(1))
    assert [segment.text for segment in segments] == ["AT"] and segmenter.stable_text == ""
    assert seen[0].flatten().tolist() == list(range(27))  # only frames of this segment


def test_a_word_after_a_forced_cut_is_written_once():
    """The frames before the cut show the search the word after it."""

    def search(frames, log_probs):
        path = [int(frame) for frame in frames[:, 0]]
        early = [] if path[-1] or ended else [A]  # only the cut in the middle ends with a blank
        ended.append(path)
        best = [token for token, before in zip(path, [0, *path], strict=False) if token not in (0, before)]
        return best + early, log_probs_of(path[:-1] + (early or path[-1:]))

    path, ended = ([THE, CAT] * 12 + [0] * 4 + [A, S] * 15)[:50] + PAUSE, []
    segmenter = Segmenter(Tokenizer, longest=1.2, search=search)
    segments = segmenter.accept(log_probs_of(path), torch.tensor(path).unsqueeze(1).float()) + segmenter.finish()
    texts = [segment.text.split() for segment in segments]
    assert len(texts) > 1 and ended[0][-1] == 0 and texts[0][-1] == "CAT" and texts[1][0] == "AS"


@pytest.mark.parametrize("gap", range(6))
def test_a_short_word_before_a_forced_cut_is_kept(gap):
    """A search that writes what greedy search writes loses and doubles nothing, wherever the cut lies."""
    path = ([THE, CAT] * 10 + [A] + [0] * gap + [THE, CAT] * 10) * 3 + PAUSE

    def search(frames, log_probs):
        best = log_probs.argmax(-1).tolist()
        return [token for token, before in zip(best, [0, *best], strict=False) if token not in (0, before)], log_probs

    found = []
    for keys in ({}, {"search": search}):
        segmenter = Segmenter(Tokenizer, longest=1.2, **keys)
        segments = segmenter.accept(log_probs_of(path), torch.zeros(len(path), 1)) + segmenter.finish()
        found.append([segment.text for segment in segments])
    assert found[0] == found[1] and len(found[0]) > 2


def test_alignment_needs_enough_frames():
    log_probs = log_probs_of([0, THE, THE, 0, S, S])
    assert [(start, end) for start, end, _ in align(log_probs, [THE, S])] == [(1, 3), (4, 6)]
    assert align(log_probs, []) == []
    with pytest.raises(ValueError, match="2 tokens of the text need 3 frames, but the audio has 2"):
        align(log_probs[:2], [S, S])


def test_subtitles():
    segments = [Segment(0.5, 1.25, "TOM & <JERRY>", 1.0), Segment(3599.9996, 3600.2, "B", 1.0)]
    assert subtitles(segments, "srt").splitlines()[:3] == ["1", "00:00:00,500 --> 00:00:01,500", "TOM & <JERRY>"]
    assert subtitles(segments, "srt").splitlines()[5] == "01:00:00,000 --> 01:00:00,200"
    vtt = subtitles(segments, "vtt").splitlines()
    assert vtt[0] == "WEBVTT" and vtt[2:4] == ["00:00:00.500 --> 00:00:01.500", "TOM &amp; &lt;JERRY&gt;"]


# -------------------- with a model


KINDS = {
    "joint": ("hyperconformer", 1, {}),
    "ctc": ("hyperconformer", 0, {}),
    "transducer": ("hyperconformer_transducer", 0, {**SMALL_TRANSDUCER, "transducer_beam": 1}),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder, (name, layers, keys) = tmp_path_factory.mktemp("recognizer"), KINDS[request.param]
    make_model(folder, layers, name, **keys)
    return folder


@pytest.fixture
def model(folder):
    """A model with random weights that predicts blanks in half of the frames."""
    model = load_model(folder / "model", "cpu")
    with torch.no_grad():
        (log_probs,), _ = model.frames(speech(100_000)[None], torch.ones(1))
        others = log_probs.clone()
        others[:, model.blank] = -torch.inf
        model.ctc_head.w.bias[model.blank] += (others.amax(1) - log_probs[:, model.blank]).median()
        if isinstance(model, TransducerModel):
            talkative(model, speech(50_000))
    return model


def recognize(model, wav, sizes, **keys):
    recognizer, segments, start = StreamingRecognizer(model, **keys), [], 0
    while start < len(wav):
        for size in sizes:
            segments += recognizer.accept(wav[start : start + size])
            start += size
    return segments + recognizer.finish()


FOREVER = {"endpoint": 1e6, "longest": 1e6}


@torch.no_grad()
def test_a_stream_says_what_the_chunked_file_says(model):
    wav = speech(50_123)
    (segment,) = recognize(model, wav, (1237,), chunk_size=8, left_context=2, **FOREVER)
    recognizer = StreamingRecognizer(model, 8, 2)
    enc, _ = model.mods.encoder.encode(wav[None], dynchunktrain_config=recognizer._config)
    if isinstance(model, TransducerModel):
        (tokens,) = model.search(enc, torch.ones(1))
    else:
        best = model._log_probs(enc)[0].argmax(-1)
        tokens = [token for token in best.unique_consecutive().tolist() if token != model.blank]
    assert segment.text == " ".join(model.tokenizer.decode_ids(tokens).split())


@pytest.mark.parametrize("keys", [{}, {"chunk_size": 4, "left_context": -1}, {"chunk_size": 50}])
def test_segments_do_not_depend_on_the_pieces_and_can_be_resumed(model, keys):
    wav = speech(160_000)
    keys |= {"endpoint": 0.04, "longest": 1.0}
    segments = recognize(model, wav, (1600,), **keys)
    assert len(segments) > 3
    assert recognize(model, wav, (7, 16_001, 1), **keys) == recognize(model, wav, (200_000,), **keys) == segments
    known = [index for index, segment in enumerate(segments[:-1]) if segment.resume is not None]
    assert known
    for index in known[:: max(1, len(known) // 3)]:
        start = segments[index].resume
        rest = recognize(model, wav[round(16000 * start) :], (999,), start=start, **keys)
        assert said(rest) == said(segments[index + 1 :])


@pytest.mark.parametrize("folder", ["transducer"], indirect=True)
def test_a_beam_streams_as_greedy_search_does(model):
    model.choose_beam(4)
    test_a_stream_says_what_the_chunked_file_says(model)
    wav, keys = speech(100_000), {"chunk_size": 8, "endpoint": 0.04, "longest": 1.0}
    segments = recognize(model, wav, (1600,), **keys)
    assert len(segments) > 2 and recognize(model, wav, (7, 16_001), **keys) == segments
    assert [word.text for word in segments[0].words] == segments[0].text.split()
    recognizer, shown, final = StreamingRecognizer(model, **keys), "", ""
    for piece in wav.split(5000):
        final += "".join(f"{segment.text} " for segment in recognizer.accept(piece))
        assert (final + recognizer.stable_text).startswith(shown.strip())
        assert (final + recognizer.text).startswith((final + recognizer.stable_text).strip())
        shown = final + recognizer.stable_text
    with pytest.raises(ValueError, match="The beam size is 0; give a whole number from 1 to 1000."):
        model.choose_beam(0)


@pytest.mark.parametrize("folder", ["transducer"], indirect=True)
def test_a_stream_that_begins_anew_uses_the_search_of_now(model):
    wav, recognizer = speech(50_000), StreamingRecognizer(model)
    model.choose_search("ctc_beam")
    recognizer.reset()
    assert said(recognizer.accept(wav) + recognizer.finish()) == said(recognize(model, wav, (50_000,)))


@pytest.mark.parametrize("folder", ["transducer"], indirect=True)
def test_words_of_a_transducer_are_those_of_its_segment(model):
    """CTC places the words, no later than the transducer emits them; none is lost if a segment ends without a pause."""
    segments = recognize(model, speech(160_000), (1600,), chunk_size=8, endpoint=30, longest=1.0)
    assert len(segments) > 2 and any(segment.words for segment in segments)
    for one, other in zip(segments, segments[1:], strict=False):
        assert one.end <= one.resume + 1e-6 and other.start >= one.resume - 1e-6
        assert not one.words or [word.text for word in one.words] == one.text.split()
        assert all(word.start < word.end for word in one.words)


def mute(model):
    """A model that predicts only blanks."""
    with torch.no_grad():
        model.ctc_head.w.bias[model.blank] += 1e3
        if isinstance(model, TransducerModel):
            model.mods.decoder.transducer.out.bias[model.blank] += 1e3
    return model


@pytest.mark.parametrize("endpoint, longest", [(30, 30), (0.8, 0.5), (100, 1), (0.04, 0.08)])
def test_silence_ends(model, endpoint, longest):
    recognizer = StreamingRecognizer(mute(model), endpoint=endpoint, longest=longest)
    for _ in range(35):
        assert recognizer.accept(torch.zeros(16_000)) == []
        assert recognizer._audio.shape[1] <= 16_000 * (max(endpoint, longest) + 3)
    assert recognizer.finish() == []


def test_what_is_stable_stays_where_the_encoder_starts_anew(model):
    recognizer, shown, final = StreamingRecognizer(model, 4, -1, endpoint=30, longest=1.5), "", ""
    ends = 0
    for piece in speech(320_000).split(1000):
        ended = recognizer.accept(piece)
        ends += len(ended)
        final += "".join(f"{segment.text} " for segment in ended)
        now = final + recognizer.stable_text
        assert now.startswith(shown.strip())
        shown = now
    assert ends > 5 and (final + " ".join(segment.text for segment in recognizer.finish())).startswith(shown.strip())
    assert recognizer._audio.shape[1] < 16_000 * 4


def test_other_frame_rates_are_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "hyperparams.yaml"
    path.write_text(path.read_text().replace("lobes.features.Fbank\n", "lobes.features.Fbank\n  hop_length: 20\n"))
    with pytest.raises(ValueError, match="a frame every 80 ms; train it with 40 ms"):
        load_model(tmp_path / "model", "cpu")


def test_tiny_pieces_are_put_together(model):
    wav = speech(20_000)
    assert said(recognize(model, wav, (3,))) == said(recognize(model, wav, (20_000,)))


def test_bad_samples_are_refused_and_nothing_is_taken_in(model):
    recognizer = StreamingRecognizer(model)
    for wav, message in ((torch.zeros(2, 100), "one channel"), (torch.tensor([0.0, torch.nan]), "NaN")):
        with pytest.raises(ValueError, match=message):
            recognizer.accept(wav)
    assert recognizer.finish() == []
    for keys, message in (
        ({"chunk_size": "16"}, "chunk_size is '16'"),
        ({"chunk_size": 0}, "chunk size is 0"),
        ({"endpoint": -1}, "endpoint is -1"),
        ({"longest": None}, "longest is None; give a number"),
        ({"start": "0"}, "start is '0'; give a number"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamingRecognizer(model, **keys)


def test_state_stays_small(model):
    recognizer, sizes = StreamingRecognizer(model, 8, 4, longest=2.0), []
    for index in range(12):
        recognizer.accept(speech(16_000, seed=index))
        sizes.append(recognizer.state_bytes())
        assert recognizer._audio.shape[1] < 5 * 16_000
    assert max(sizes) == max(sizes[:4])


# -------------------- long files


@pytest.fixture
def long_file(tmp_path, monkeypatch):
    """A file of 35 s, and windows of 6 s."""
    monkeypatch.setattr(long_audio, "CORE", 100)
    monkeypatch.setattr(long_audio, "MARGIN", 25)
    path = tmp_path / "talk.flac"
    soundfile.write(path, 0.1 * speech(560_123).numpy(), 16000)
    return path


@torch.no_grad()
def test_windows_lie_side_by_side(model, long_file):
    wav = model.load_audio(long_file)
    blocks = [list(wav.split(size)) for size in (1000, 70_001, 10**6)]
    log_probs = [torch.cat([log_probs for log_probs, _ in long_audio.window_frames(model, split)]) for split in blocks]
    assert log_probs[0].shape[0] == -(-(1 + len(wav) // 160) // 4)
    for others in log_probs[1:]:
        torch.testing.assert_close(others, log_probs[0], atol=1e-4, rtol=0)
    # The inner frames of a window are equal to those of the window alone
    alone = model.frames(wav[None, 640 * 75 : 640 * 225], torch.ones(1))[0][0]
    torch.testing.assert_close(log_probs[0][100:200], alone[25:125], atol=1e-4, rtol=0)
    # Start at a later frame
    rest = wav[640 * long_audio.window_start(230) :]
    resumed = torch.cat([log_probs for log_probs, _ in long_audio.window_frames(model, [rest], 230)])
    torch.testing.assert_close(resumed, log_probs[0][230:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_file_of_one_window_is_the_whole_file(model, tmp_path):
    wav = speech(40_000)
    log_probs = torch.cat([log_probs for log_probs, _ in long_audio.window_frames(model, [wav])])
    torch.testing.assert_close(log_probs, model.frames(wav[None], torch.ones(1))[0][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_run_goes_on_with_the_same_segments(model, long_file, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(long_audio, "Segmenter", lambda *args, **keys: Segmenter(*args, **keys, endpoint=0.04, longest=1.0))
    monkeypatch.setattr(
        long_audio, "StreamingRecognizer", lambda model, **keys: StreamingRecognizer(model, **keys, endpoint=0.04, longest=1.0)
    )
    settings = settings_of(model, streaming)

    def run(folder, stop=None):
        file = SegmentFile(folder, long_file, settings)
        with file.opened():
            known = len(file.segments)
            for count, segment in enumerate(transcribe_long(model, long_file, streaming, file.start)):
                if count == stop:
                    return known
                file.add(segment)
            file.finish(file.segments)
        return known

    run(tmp_path / "once")
    assert run(tmp_path / "again", stop=5) == 0
    partial = tmp_path / "again" / "talk.jsonl.partial"
    partial.write_text(partial.read_text() + '{"start": 1')  # killed while writing
    assert run(tmp_path / "again", stop=4) > 0
    run(tmp_path / "again")
    for suffix in ("jsonl", "srt", "vtt"):
        once, again = (tmp_path / folder / f"talk.{suffix}" for folder in ("once", "again"))
        if suffix != "jsonl":
            assert again.read_text() == once.read_text()
    texts = [[json.loads(line)["text"] for line in (tmp_path / name / "talk.jsonl").open()] for name in ("once", "again")]
    assert texts[0] == texts[1] and len(texts[0]) > 5
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == [".talk.jsonl.from", "talk.jsonl", "talk.srt", "talk.vtt"]
    # With another model, a finished file is refused, and an unfinished one too; one without segments begins again
    other = settings | {"model": "another"}
    with pytest.raises(ValueError, match="talk.jsonl is of another model; move it away, or give another folder"):
        SegmentFile(tmp_path / "once", long_file, other)
    run(tmp_path / "other", stop=5)
    partial = tmp_path / "other" / "talk.jsonl.partial"
    content = partial.read_text()
    with pytest.raises(ValueError, match="talk.jsonl.partial is of another model; move it away"):
        SegmentFile(tmp_path / "other", long_file, other)
    assert partial.read_text() == content
    partial.write_text(content.splitlines()[0] + "\n")
    file = SegmentFile(tmp_path / "other", long_file, other)
    with file.opened():
        assert file.segments == [] and len(partial.read_text().splitlines()) == 1
    # The same audio may have another time, and another place if it has left the first one; other audio is refused
    os.utime(long_file, (0, 0))
    assert SegmentFile(tmp_path / "once", long_file, settings).finished
    moved = tmp_path / "moved" / long_file.name
    moved.parent.mkdir()
    shutil.copy(long_file, moved)
    with pytest.raises(ValueError, match="talk.jsonl is of other audio; move it away"):
        SegmentFile(tmp_path / "once", moved, settings)
    long_file.unlink()
    assert SegmentFile(tmp_path / "once", moved, settings).finished
    with pytest.raises(ValueError, match=r"talk.jsonl is of other settings \(beam_size None, now 3\); move it away"):
        SegmentFile(tmp_path / "once", moved, settings | {"beam_size": 3})
    soundfile.write(moved, np.ones(1000), 16000)
    with pytest.raises(ValueError, match="talk.jsonl is of other audio; move it away"):
        SegmentFile(tmp_path / "once", moved, settings)


@torch.no_grad()
@pytest.mark.parametrize("folder", ["ctc"], indirect=True)
def test_long_files_are_read_in_windows_also_by_models_that_stream(model, long_file):
    in_windows = list(transcribe_long(model, long_file))
    model.mods.encoder.chunk_size = 8
    assert list(transcribe_long(model, long_file)) == in_windows != list(transcribe_long(model, long_file, streaming=True))


@pytest.mark.parametrize("folder", ["ctc"], indirect=True)  # joint search on long segments takes minutes
def test_transcribe_long_and_short_files_to_a_folder(capsys, folder, long_file, tmp_path, monkeypatch):
    monkeypatch.setattr(files_to_text, "LONG_SECONDS", 10)
    command = ["transcribe", "--model", str(folder / "model"), str(folder / "short.flac"), str(long_file), "--device", "cpu"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    assert cli.main([*command, "--output", str(out)]) == 0
    assert capsys.readouterr().out == printed
    lines = [json.loads(line) for line in (out / "talk.jsonl").open()]
    assert " ".join(line["text"] for line in lines) == printed.splitlines()[1].split("\t")[1]
    assert all(line["start"] <= line["end"] for line in lines) and {"confidence", "words"} <= lines[0].keys()
    assert (out / "short.jsonl").exists() and (out / "short.srt").exists()
    before = (out / "talk.jsonl").stat().st_mtime_ns
    assert cli.main([*command, "--output", str(out)]) == 0
    again = capsys.readouterr()
    assert again.out == printed and "exists and is kept" in again.err and (out / "talk.jsonl").stat().st_mtime_ns == before


def test_files_of_one_name_are_refused(capsys, folder, tmp_path):
    (tmp_path / "short.flac").write_bytes((folder / "short.flac").read_bytes())
    files = [str(folder / "short.flac"), str(tmp_path / "short.flac")]
    assert cli.main(["transcribe", "--model", str(folder / "model"), *files, "--output", str(tmp_path)]) == 2
    assert "short.jsonl" in capsys.readouterr().err


def test_stream_prints_segments_and_figures(capsys, folder, monkeypatch):
    assert cli.main(["stream", "--model", str(folder / "model"), str(folder / "long.flac"), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert all(len(line.split("\t")) == 3 for line in out.splitlines())
    assert "real-time factor" in err and "full context only" in err
    samples, _ = soundfile.read(folder / "long.flac", dtype="int16")
    raw = io.BytesIO(samples.astype("<i2").tobytes() + b"\0")  # with half a sample at the end
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(raw)))
    assert cli.main(["stream", "--model", str(folder / "model"), "-", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("folder", ["ctc"], indirect=True)
def test_a_stream_that_the_system_stops_prints_its_last_segment(capsys, folder, monkeypatch):
    arguments = ["stream", "--model", str(folder / "model"), "-", "--device", "cpu"]
    samples, _ = soundfile.read(folder / "long.flac", dtype="int16")
    printed = []
    for ends in (lambda: b"", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        parts = [samples.astype("<i2").tobytes()]
        pipe = SimpleNamespace(read1=lambda _, parts=parts, ends=ends: parts.pop() if parts else ends())
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
        status = cli.main(arguments)
        printed.append((status, capsys.readouterr().out))
    assert printed[0][1] and printed == [(0, printed[0][1]), (128 + signal.SIGTERM, printed[0][1])]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.wav"], "no audio file nowhere.wav"),
        (["-", "--sample-rate", "0"], "--sample-rate is 0"),
        (["speech.wav", "--sample-rate", "8000"], "--sample-rate is for raw samples on standard input"),
        (["-", "--chunk-size", "0"], "chunk size is 0"),
        (["-", "--endpoint", "0"], "endpoint is 0"),
    ],
)
def test_stream_says_what_is_wrong(capsys, folder, arguments, message):
    assert cli.main(["stream", "--model", str(folder / "model"), *arguments, "--device", "cpu"]) in (1, 2)
    assert message in capsys.readouterr().err


def test_words_of_a_given_text(model):
    wav = 0.1 * torch.randn(32_000)
    words = model.align(wav, "THE CAT SAT")
    assert [word.text for word in words] == ["THE", "CAT", "SAT"]
    assert all(a.end <= b.start for a, b in zip(words, words[1:], strict=False)) and words[-1].end <= 2.04
    with pytest.raises(ValueError, match="give a shorter text"):
        model.align(wav[:3000], "THE CAT SAT")
    with pytest.raises(UserError, match="give a shorter text"):
        model.align(wav[:0], "A")


def test_times_of_the_mini_tokenizer(folder):
    tokenizer = SentencePieceProcessor(str(folder / "t.model"))
    tokens = tokenizer.encode_as_ids("A HOT DAY")
    path = [frame for token in tokens for frame in (0, token)]
    log_probs = torch.eye(tokenizer.vocab_size())[path].mul(9).log_softmax(-1)
    segmenter = Segmenter(tokenizer)
    (segment,) = segmenter.accept(log_probs) + segmenter.finish()
    assert [word.text for word in segment.words] == ["A", "HOT", "DAY"] and segment.text == "A HOT DAY"
    assert np.isclose(segment.words[-1].end, FRAME_SECONDS * len(path))
