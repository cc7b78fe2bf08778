"""Subtitles have few and short lines, short times within the audio, and the complete text."""

import json
import math
import os
import random
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_streaming import speech

from speechbrain_ext import cli
from speechbrain_ext.cli import transcribe as command
from speechbrain_ext.dataio.audio import count_samples
from speechbrain_ext.decoders.alignment import Segment, Word
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference import transcribe as files_to_text
from speechbrain_ext.inference.long_audio import SegmentFile, settings_of
from speechbrain_ext.inference.subtitles import MIN_SECONDS, SubtitleOptions, _pieces, cues, subtitles
from speechbrain_ext.inference.transcribe import Transcript, transcribe_files
from speechbrain_ext.utils.errors import UserError

DEFAULT = SubtitleOptions()
OPTIONS = [
    DEFAULT,
    SubtitleOptions(word_times=True),
    SubtitleOptions(1, 20, 3.0),
    SubtitleOptions(3, 30, 5.5, True),
    SubtitleOptions(2, 1, 1),
    SubtitleOptions(10**20, 10**20, 1e9, True),
]


def words_from(texts, start=0.0, seconds=0.3, pause=0.04, pauses=None):
    """Consecutive words; ``pauses`` has other pauses, by the number of words before them."""
    words = []
    for index, text in enumerate(texts):
        start += (pauses or {}).get(index, pause) if index else 0.0
        words.append(Word(text, round(start, 3), round(start + seconds, 3), 0.9))
        start += seconds
    return tuple(words)


def segment_of(words):
    return Segment(words[0].start, words[-1].end, " ".join(word.text for word in words), 0.9, tuple(words))


# -------------------- reading subtitles


def seconds_of(clock):
    hours, minutes, seconds = clock.replace(",", ".").split(":")
    return round(int(hours) * 3600 + int(minutes) * 60 + float(seconds), 3)


def read_back(text, style):
    """Read (start, end, lines, times of words) of each cue, and check the format."""
    if style == "vtt":
        assert text.startswith("WEBVTT\n")
        text = text.removeprefix("WEBVTT\n").removeprefix("\n")
    assert text == "" or text.endswith("\n") and not text.endswith("\n\n")
    found, clock = [], r"\d\d+:\d\d:\d\d" + (r"\.\d{3}" if style == "vtt" else r",\d{3}")
    for number, block in enumerate(text.removesuffix("\n").split("\n\n") if text else [], 1):
        head, *lines = block.split("\n")
        if style == "srt":
            assert head == str(number)
            head, *lines = lines
        start, end = re.fullmatch(f"({clock}) --> ({clock})", head).groups()
        assert lines and all(line.strip() == line != "" and "-->" not in line for line in lines), block
        times = []
        if style == "vtt":
            times = [seconds_of(time) for time in re.findall(f"<({clock})>", block)]
            lines = [re.sub(f"<{clock}>", "", line) for line in lines]
            assert not any(re.search("[<>]|&(?!amp;|lt;|gt;)", line) for line in lines)
            lines = [line.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for line in lines]
        found.append((seconds_of(start), seconds_of(end), lines, times))
    return found


# -------------------- properties of subtitles, on random segments


def latin(generator):
    word = "".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZÄÉß'", k=min(1 + int(generator.expovariate(0.2)), 60)))
    return generator.choice([word] * 20 + ["&", "<i>", "-->", "----->", "a&amp;b", "NOTE", "12"])


def chinese(generator):
    return "".join(generator.choices("我们今天去看电影因为天气很好。", k=generator.choice([2, 5, 20, 43, 130])))


def thai(generator):
    return "".join(generator.choices(["ก", "กี่", "ที่", "น้ำ", "เป็น"], k=generator.choice([2, 10, 60])))


def random_segments(generator, script):
    """Segments as recognisers make them: words and pauses of any length in frames of 40 ms, some without word times."""
    frame, segments = generator.randrange(30), []
    for _ in range(generator.randrange(6)):
        words = []
        for _ in range(generator.choice([1, 2, 5, 20, 60])):
            length = generator.choice([1, 2, 8, 15, 30 if script is latin else 300])
            text = script(generator)
            words.append(Word(text, round(0.04 * frame, 3), round(0.04 * (frame + length), 3), 0.5))
            frame += length + generator.choice([0, 0, 1, 2, 10, 19])
        segment = segment_of(words)
        if generator.random() < 0.2:
            segment = Segment(segment.start, segment.end, segment.text, 0.0)
        segments.append(segment)
        frame += generator.choice([0, 1, 20, 100])
    # The audio may end within the last frame, because its length need not be a multiple of 40 ms
    seconds = (segments[-1].end if segments else 0.0) + generator.choice([-0.0395, -0.01, 0.0, 0.5, 10.0])
    return segments, max(0.001, round(seconds, 4))


def unspaced(texts):
    return "".join("".join(text.split()) for text in texts)


def fits(words, options):
    """Whether words fit in one cue."""
    if words[-1].end - words[0].start > options.max_seconds:
        return False
    lines, used = 1, 0
    for word in words:
        more = len(word.text) + bool(used)
        lines, used = (lines, used + more) if used + more <= options.max_line_length else (lines + bool(used), len(word.text))
    return lines <= options.max_lines


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("script", [latin, chinese, thai])
def test_promises(script, options):
    for seed in range(60 if options.max_line_length > 1 else 12):
        segments, seconds = random_segments(random.Random(seed), script)
        read = {style: read_back(subtitles(segments, style, options, seconds), style) for style in ("srt", "vtt")}
        found = cues(segments, options, seconds)
        assert [(cue.start, cue.end, cue.text.split("\n")) for cue in found] == [part[:3] for part in read["vtt"]]
        assert [part[:2] for part in read["srt"]] == [part[:2] for part in read["vtt"]]
        texts = [word.text for segment in segments for word in segment.words or [Word(segment.text, 0, 0, 0)]]
        said = {text for words in texts for text in words.split()}
        shown = unspaced(line for *_, lines, _ in read["vtt"] for line in lines)
        assert shown == unspaced(texts)
        shown = unspaced(line for *_, lines, _ in read["srt"] for line in lines)
        assert shown == re.sub("-{2,}>", "->", unspaced(texts))
        limits = [*(start for start, *_ in read["vtt"]), math.floor(1000 * seconds + 1e-6) / 1000][1:]
        for (start, end, lines, times), limit in zip(read["vtt"], limits, strict=True):
            assert 0 <= start < end <= limit <= seconds
            assert end - start <= options.max_seconds + 1e-6
            assert end - start >= min(MIN_SECONDS, limit - start) - 1e-6
            assert len(lines) <= options.max_lines
            for line in lines:
                assert not unicodedata.category(line[0]).startswith("M")
                letters = sum(not unicodedata.category(character).startswith("M") for character in line)
                assert len(line) <= options.max_line_length or (line in said and script is latin) or letters == 1
            assert all(start < time < end for time in times) and all(a < b for a, b in pairwise(times))
            assert options.word_times or not times
        starts = {word.start for segment in segments for word in segment.words}
        assert {time for *_, times in read["vtt"] for time in times} <= {round(start, 3) for start in starts}


@pytest.mark.parametrize("seed", range(60))
def test_cues_begin_and_end_with_their_words(seed):
    segments, seconds = random_segments(random.Random(seed), latin)
    words = [word for segment in segments for word in segment.words or [Word(t, -1, -1, 0) for t in segment.text.split()]]
    by_cue = []
    for cue in cues(segments, DEFAULT, seconds + 10):
        count = len(cue.text.split())
        by_cue.append((cue, words[:count]))
        words = words[count:]
    assert not words
    for (cue, words), limit in zip(by_cue, [*(cue.start for cue, _ in by_cue), seconds + 10][1:], strict=True):
        if words[0].start >= 0:
            assert cue.start == words[0].start
            end = max(words[-1].end, cue.start + MIN_SECONDS)
            assert cue.end == pytest.approx(min(end, cue.start + DEFAULT.max_seconds, limit))


@pytest.mark.parametrize("seed", range(60))
def test_no_short_word_is_left_alone_where_another_could_join_it(seed):
    for segment in random_segments(random.Random(seed), latin)[0]:
        found, words = cues([segment], DEFAULT), list(segment.words)
        if words and len(found) > 1 and len(found[-1].text.split()) == 1 and len(found[-1].text) < 21:
            assert not fits(words[-2:], DEFAULT)


@pytest.mark.parametrize("seed", range(60))
def test_lines_are_as_few_and_even_as_can_be(seed):
    generator = random.Random(seed)
    for segment in random_segments(generator, latin)[0]:
        for cue in cues([segment], DEFAULT):
            texts = cue.text.split()
            lines = cue.text.split("\n")
            if len(lines) == 1:
                continue
            assert len(" ".join(texts)) > 42
            others = [(" ".join(texts[:index]), " ".join(texts[index:])) for index in range(1, len(texts))]
            if max(map(len, lines)) <= 42:
                shortest = min(max(map(len, other)) for other in others)
                assert max(map(len, lines)) == shortest
                assert len(lines[0]) == min(len(upper) for upper, lower in others if max(len(upper), len(lower)) == shortest)


# -------------------- known cases


def test_a_segment_of_24_seconds_and_402_characters():
    words = words_from(["ABCDEFG"] * 50 + ["AB"], seconds=0.42, pause=0.05)
    segment = segment_of(words)
    assert len(segment.text) == 402 and 23 < segment.end < 24.1
    found = cues([segment], seconds=segment.end - 0.03)
    assert " ".join(cue.text for cue in found).split() == segment.text.split()
    assert all(len(line) <= 42 for cue in found for line in cue.text.split("\n"))
    assert all(cue.end - cue.start <= 7 and cue.text.count("\n") <= 1 for cue in found)
    assert 5 <= len(found) <= 6 and found[-1].end <= segment.end - 0.03
    assert min(len(cue.text) for cue in found) > 40  # cues are about equal


def test_cues_end_at_the_longest_pause():
    texts = "THE RAIN HAD STOPPED AND THE STREETS WERE EMPTY BUT NOBODY WANTED TO GO HOME BEFORE THE MUSIC WAS OVER".split()
    for pause_after in range(6, 15):
        found = cues([segment_of(words_from(texts, pauses={pause_after: 0.6}))])
        assert [len(cue.text.split()) for cue in found] == [pause_after, len(texts) - pause_after]
    found = cues([segment_of(words_from(texts, pauses={7: 0.3, 11: 0.6}))])
    assert [len(cue.text.split()) for cue in found] == [11, len(texts) - 11]


def test_exact_srt():
    texts = "THE RAIN HAD STOPPED AND THE STREETS WERE EMPTY BUT NOBODY WANTED TO GO HOME BEFORE THE MUSIC WAS OVER".split()
    words = words_from(texts, start=1.0, pauses={9: 0.5})
    assert subtitles([segment_of(words), segment_of(words_from(["YES"], 9.0))], "srt", seconds=9.5) == (
        "1\n00:00:01,000 --> 00:00:04,020\nTHE RAIN HAD STOPPED AND\nTHE STREETS WERE EMPTY\n\n"
        "2\n00:00:04,520 --> 00:00:08,220\nBUT NOBODY WANTED TO GO HOME\nBEFORE THE MUSIC WAS OVER\n\n"
        "3\n00:00:09,000 --> 00:00:09,500\nYES\n"
    )


def test_exact_vtt_with_word_times():
    words = words_from(["TOM", "&", "<JERRY>", "-->", "RAN"], start=0.5)
    options = SubtitleOptions(max_line_length=13, word_times=True)
    assert subtitles([segment_of(words)], "vtt", options, 60.0) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:02.160\n"
        "TOM <00:00:00.840>&amp; <00:00:01.180>&lt;JERRY&gt;\n<00:00:01.520>--&gt; <00:00:01.860>RAN\n"
    )
    assert subtitles([segment_of(words)], "srt", options, 60.0).split("\n")[2:4] == ["TOM & <JERRY>", "-> RAN"]


def test_a_text_without_spaces_is_divided_in_lines_and_times_in_proportion():
    word = Word("我" * 100, 10.0, 30.0, 0.9)
    found = cues([segment_of([word])], SubtitleOptions(max_line_length=16), 60.0)
    assert "".join(cue.text for cue in found).replace("\n", "") == word.text
    assert found[0].start == 10.0 and found[-1].end == 30.0
    assert all(len(line) <= 16 for cue in found for line in cue.text.split("\n"))
    assert all(a.end == b.start for a, b in pairwise(found)) and all(cue.end - cue.start <= 7 for cue in found)
    for cue in found:
        assert cue.end - cue.start == pytest.approx(20.0 * len(cue.text.replace("\n", "")) / 100, abs=0.002)
    # A slow text is divided further
    found = cues([segment_of([Word("我" * 43, 10.0, 35.0, 0.9)])], seconds=60.0)
    assert len(found) == 4 and found[-1].end == 35.0 and all(a.end == b.start for a, b in pairwise(found))
    # A text that fits in a line, and a long word of Latin letters, are not divided
    assert [cue.text for cue in cues([segment_of([Word("我" * 16, 0, 9.0, 0.9)])], SubtitleOptions(max_line_length=16))] == [
        "我" * 16
    ]
    assert [cue.text for cue in cues([Segment(0, 2, f"A {'B' * 50} C", 0.9)])] == ["A", f"{'B' * 50}\nC"]


def test_a_segment_without_words_is_divided_by_characters():
    segment = Segment(0.0, 20.0, "ABCD " * 39 + "ABCD", 0.0)  # 199 characters
    found = cues([segment], SubtitleOptions(word_times=True), 20.0)
    assert " ".join(cue.text for cue in found).split() == segment.text.split()
    for cue, before in zip(found, [0, *(sum(len(cue.text) + 1 for cue in found[:index]) for index in range(1, 9))], strict=False):
        assert cue.start == pytest.approx(20.0 * before / 199, abs=0.001)
    assert "<" not in subtitles([segment], "vtt", SubtitleOptions(word_times=True))  # the times of these words are unknown


@pytest.mark.parametrize(
    "text, starts",
    [
        ("ONE TWO THREE FOUR", [0.0, 1.0, 2.0, 3.0]),
        ("ONE 2 THREE FOUR", [0.0, 1.0, 2.0, 3.0]),
        ("ONE TWOTHREE FOUR", [0.0, 1.0, 3.0]),
        ("ONE TWO AND A THREE FOUR", [0.0, 1.0, 1.6, 1.85, 2.0, 3.0]),
        ("SO ONE FOUR THEN", [0.0, 0.0, 3.0, 3.0]),
        ("OTHER WORDS", [0.0, 1.75]),
        ("", []),
    ],
)
def test_a_text_that_was_corrected_by_hand(text, starts):
    assert Transcript("a.wav", [Segment(0.0, 4.0, f" {text}\n\tEND", 1.0, ())]).text == f"{text} END".strip()
    words = tuple(Word(word, start, start + 0.5, 1.0) for start, word in enumerate(("ONE", "TWO", "THREE", "FOUR")))
    segment = Segment(0.0, 4.0, text, 1.0, words)
    found = cues([segment], SubtitleOptions(1, 1, 1.0), 4.0)
    assert " ".join(cue.text for cue in found) == text
    assert " ".join(cue.text for cue in cues([segment])) == text
    for piece, start in zip(_pieces(segment, DEFAULT), starts, strict=True):
        assert piece.start == pytest.approx(start, abs=0.2) and 0 < piece.end - piece.start < 2


def test_what_is_no_text_makes_no_cue():
    assert cues([]) == [] and subtitles([], "srt") == "" and subtitles([], "vtt") == "WEBVTT\n"
    assert cues([Segment(0.0, 1.0, " \n", 0.0)]) == []
    (cue,) = cues([segment_of([Word("A\n\nB", 0.0, 1.0, 1.0), Word(" ", 1.0, 1.1, 1.0), Word("C\u2028", 1.2, 1.5, 1.0)])])
    assert cue.text == "A B C"


def test_words_that_end_with_the_audio():
    """The last word may begin in the frame in which the audio ends."""
    words = [Word("A", 0.0, 0.04, 1.0), Word("B", 3.96, 3.96, 1.0)]
    found = cues([segment_of(words[:1]), segment_of(words[1:])], seconds=3.9604)
    assert [(cue.start, cue.end) for cue in found] == [(0.0, 1.0), (3.959, 3.96)]
    (cue,) = cues([segment_of([Word("A", 0.0, 0.04, 1.0)])], seconds=1 / 16000)
    assert (cue.start, cue.end) == (0.0, 0.001)


# -------------------- options


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"max_lines": 0}, "largest number of lines is 0; give a whole number, 1 or more"),
        ({"max_lines": 1.5}, "largest number of lines is 1.5"),
        ({"max_line_length": -1}, "largest number of characters in a line is -1"),
        ({"max_seconds": 0.9}, "longest time is 0.9; give a number of seconds, 1 or more"),
        ({"max_seconds": math.nan}, "longest time is nan"),
        ({"max_seconds": math.inf}, "longest time is inf"),
        ({"max_seconds": "7"}, "longest time is '7'"),
        ({"word_times": 1}, "word_times is 1; give True or False"),
    ],
)
def test_impossible_options(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        SubtitleOptions(**keys)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_an_unknown_style():
    with pytest.raises(UserError, match="style of subtitles is 'ass'; give srt or vtt"):
        subtitles([], "ass")


# -------------------- files


FOLDER = Path(__file__).parent / "data" / "model_folders" / "ctc-v1"


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER, "cpu")


@pytest.fixture
def files(tmp_path):
    """Two files, one long enough to be processed in pieces; neither ends at the end of a frame."""
    paths = []
    for name, samples in (("short", 80_001), ("long", 16_000 * 61 + 5)):
        paths.append(tmp_path / f"{name}.wav")
        soundfile.write(paths[-1], 0.1 * speech(samples).numpy(), 16000)
    return paths


def written(folder, name):
    """The segments of the JSON lines, and the cues of both subtitle formats."""
    records = [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
    segments = [Segment(**{**record, "words": tuple(Word(**word) for word in record["words"])}) for record in records]
    return segments, *(read_back((folder / f"{name}.{style}").read_text(), style) for style in ("srt", "vtt"))


def test_all_outputs_agree_and_end_with_the_audio(model, files, tmp_path, monkeypatch):
    def later(segment):  # as if all words were at the very end, in a frame that is not complete
        return Segment(segment.start, 1e4, segment.text, 0.5, (Word("A", segment.start, 1e3, 0.5), Word("B", 1e3, 1e4, 0.5)))

    transcribe_long, split_at_pauses = files_to_text.transcribe_long, files_to_text.split_at_pauses
    monkeypatch.setattr(files_to_text, "transcribe_long", lambda *args: map(later, list(transcribe_long(*args))[-1:]))
    monkeypatch.setattr(files_to_text, "split_at_pauses", lambda segment: [later(split_at_pauses(segment)[-1])])
    without = list(transcribe_files(model, files))
    for transcript, alone in zip(transcribe_files(model, files, tmp_path / "out"), without, strict=True):
        seconds = count_samples(transcript.file) / 16000
        segments, srt, vtt = written(tmp_path / "out", Path(transcript.file).stem)
        (segment,) = segments
        assert transcript.segments == alone.segments == segments
        assert seconds - 0.001 < segment.end <= seconds
        assert [word.end for word in segment.words] == [segment.end] * 2 and segment.words[1].start == segment.end
        assert srt == vtt and srt[-1][1] <= segment.end


def test_subtitles_are_written_again_with_other_options(model, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = list(transcribe_files(model, files, out))
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    assert not any(transcript.is_from_before for transcript in first)
    for name in ("short", "long"):
        segments, srt, vtt = written(out, name)
        assert all(len(line) <= 42 for *_, lines, _ in srt for line in lines) and not any(times for *_, times in vtt)

    def never(*arguments):
        raise AssertionError("transcribed again")

    monkeypatch.setattr(model, "transcribe_segments", never)
    monkeypatch.setattr(files_to_text, "transcribe_long", never)
    # Without options, existing subtitles are kept, even corrected ones, and missing ones are written again
    (out / "short.srt").write_text("corrected")
    (out / "long.vtt").unlink()
    assert all(transcript.is_from_before for transcript in transcribe_files(model, files, out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept | {"short.srt": b"corrected"}
    options = SubtitleOptions(max_lines=1, max_line_length=20, max_seconds=3.0, word_times=True)
    again = list(transcribe_files(model, files, out, subtitle_options=options))
    assert [transcript.segments for transcript in again] == [written(out, name)[0] for name in ("short", "long")]
    for transcript in again:
        name = Path(transcript.file).stem
        assert (out / f"{name}.jsonl").read_bytes() == kept[f"{name}.jsonl"]
        segments, srt, vtt = written(out, name)
        longest = max([20, *(len(word.text) for segment in segments for word in segment.words)])
        assert all(len(lines) == 1 and len(lines[0]) <= longest and end - start <= 3.001 for start, end, lines, _ in srt)
        assert any(times for *_, times in vtt)
        seconds = count_samples(transcript.file) / 16000
        assert (out / f"{name}.vtt").read_text() == subtitles(segments, "vtt", options, seconds)
    list(transcribe_files(model, files, out, subtitle_options=DEFAULT))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept


def test_a_segment_file_alone(tmp_path):
    (tmp_path / "talk.wav").write_bytes(b"audio")
    beam, options = np.int64(4), SubtitleOptions(max_lines=1, max_line_length=4)
    file = SegmentFile(tmp_path / "out", tmp_path / "talk.wav", {"beam_size": beam}, options)
    file.finish([Segment(0.0, 5.0, "GO ON THEN", 1.0)], 4.0)
    assert [lines for *_, lines, _ in written(tmp_path / "out", "talk")[1]] == [["GO"], ["ON"], ["THEN"]]
    assert written(tmp_path / "out", "talk")[2][-1][1] == 4.0
    assert SegmentFile(tmp_path / "out", tmp_path / "talk.wav", {"beam_size": 4}).finished


def test_texts_before_a_long_file_come_before_it_is_read(model, files, monkeypatch):
    short, long = files

    def stop(*arguments):
        raise KeyboardInterrupt

    in_order = [transcript.file for transcript in transcribe_files(model, [short, long, short, "no.wav", long])]
    assert in_order == [str(short), str(long), str(short), "no.wav", str(long)]
    monkeypatch.setattr(files_to_text, "transcribe_long", stop)
    found = transcribe_files(model, ["no.wav", short, short, long])
    assert [next(found).file for _ in range(3)] == ["no.wav", str(short), str(short)]
    with pytest.raises(KeyboardInterrupt):
        next(found)


def test_what_has_no_name_in_an_output_folder(model, files, tmp_path):
    part = f"{files[0]}?offset=0&size={files[0].stat().st_size}"
    assert next(transcribe_files(model, [part])).error is None
    with pytest.raises(UserError, match="is not a whole file; copy it to a file, or give no output folder"):
        transcribe_files(model, [part], tmp_path / "out")
    os.mkfifo(tmp_path / "pipe.wav")
    pipe, good = transcribe_files(model, [tmp_path / "pipe.wav", files[0]], tmp_path / "out")
    assert "is a pipe or device" in str(pipe.error) and good.error is None
    long = tmp_path / f"{'日' * 78}.wav"
    long.write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match="日.wav is too long for the files beside its transcript; rename it"):
        transcribe_files(model, [long], tmp_path / "out")
    fits = long.rename(tmp_path / f"{'日' * 76}.wav")
    assert next(transcribe_files(model, [fits], tmp_path / "out")).error is None


def test_a_choice_that_changes_nothing_is_no_other_setting(model, files, tmp_path):
    plain = settings_of(model)
    with model.choosing():
        model.choose_search(model.own_search)
    assert settings_of(model) == plain
    model.choose_search("ctc_beam")
    with_beam = settings_of(model)
    model.choose_beam(model.beam_of("ctc_beam"))
    assert settings_of(model) == with_beam != plain
    model.choose_beam(None)
    model.choose_search(None)


def test_options_without_a_folder(model, files):
    with pytest.raises(UserError, match="give output, or leave out subtitle_options"):
        transcribe_files(model, files, subtitle_options=DEFAULT)


def test_command_line(model, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda arguments: model)
    call = ["transcribe", "--model", "model", str(files[0]), "--output", str(tmp_path / "out")]
    assert cli.main(call) == 0
    plain = capsys.readouterr().out
    asked = ["--subtitle-lines", "1", "--subtitle-line-length", "20", "--subtitle-seconds", "3", "--word-times"]
    assert cli.main([*call, *asked]) == 0
    assert capsys.readouterr().out == plain
    segments, *_ = written(tmp_path / "out", "short")
    options = SubtitleOptions(1, 20, 3.0, True)
    assert (tmp_path / "out" / "short.vtt").read_text() == subtitles(segments, "vtt", options, 80_001 / 16000)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--subtitle-lines", "0", "--output", "out"], "largest number of lines is 0; give a whole number"),
        (["--subtitle-line-length", "-3", "--output", "out"], "characters in a line is -3"),
        (["--subtitle-seconds", "nan", "--output", "out"], "longest time is nan"),
        (["--subtitle-lines", "two", "--output", "out"], "invalid int value: 'two'"),
        (["--word-times"], "Options for subtitles need --output; give a folder."),
        (["--subtitle-seconds", "5"], "Options for subtitles need --output; give a folder."),
    ],
)
def test_wrong_usage(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["transcribe", "--model", "/no/such", "a.wav", *arguments])
    except SystemExit as end:  # argparse
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and message in err and "Traceback" not in err and not list(tmp_path.iterdir())


def test_help_states_the_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["transcribe", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    for text in (f"at most ({DEFAULT.max_lines})", f"at most ({DEFAULT.max_line_length})", f"at most ({DEFAULT.max_seconds:g})"):
        assert text in help_text


@pytest.mark.timeout(20)
def test_a_minute_in_one_segment_takes_little_time():
    segment = segment_of(words_from(["AB"] * 600, seconds=0.06, pause=0.04))
    for options in OPTIONS:
        assert unspaced(cue.text for cue in cues([segment], options)) == "AB" * 600
