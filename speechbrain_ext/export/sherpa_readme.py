"""The README of a folder for sherpa-onnx, with example code."""

from pathlib import Path

from speechbrain_ext.export.sherpa_texts import STREAMS, TRANSDUCERS

WRITTEN_BY = "Written by `speechbrain_ext export --runtime sherpa-onnx`"
"""Beginning of a line of every such README; a folder without it is not replaced."""
OFFSET = (
    "sherpa-onnx removes the DC offset of the samples, but the model's Fbank does not, so texts of recordings with an offset may "
    "differ; to avoid this, train with remove_dc: true."
)
"""Note for a model with Fbank without ``remove_dc``."""
INT8 = (
    "In 8 bits, all utterances or streams that are decoded in one call share the scale of their activations, so a text may "
    "depend on the others; to avoid this, decode them one by one, or export without --int8."
)
"""Note for a model in 8 bits that is decoded in batches."""
OWNERS = {
    "zipformer_ctc": ("zipformer_ctc", "zipformerCtc", "OfflineZipformerCtcModelConfig"),
    "omnilingual_asr_ctc": ("omnilingual", "omnilingual", "OfflineOmnilingualAsrCtcModelConfig"),
    "zipformer2_ctc": ("zipformer2_ctc", "zipformer2Ctc", "OnlineZipformer2CtcModelConfig"),
    "transducer": ("transducer", "transducer", "OfflineTransducerModelConfig"),
    "zipformer2": ("transducer", "transducer", "OnlineTransducerModelConfig"),
}
"""The setting with the model's path: its field in C++, its field in Kotlin and JavaScript, and its class in Kotlin."""
SEARCH = {"decoding_method": "modified_beam_search", "hotwords_file": "hotwords.txt"}
"""Settings of the recogniser for hotwords."""
PIECES = {"modeling_unit": "bpe", "bpe_vocab": "bpe.vocab"}
"""Settings of the model for hotwords."""


def is_export(folder):
    """Whether a folder has such a README."""
    about = Path(folder, "README.md")
    return about.is_file() and WRITTEN_BY in about.read_text(encoding="utf-8", errors="replace")


def readme(kind, files, sample_rate, feature_dim, tail=0, notes=()):
    """The text of the README.

    Arguments
    ---------
    kind : str
        The runtime's type of model.
    files : dict
        Names of the ONNX files by part; the key is "" if there is only one part.
    sample_rate, feature_dim : int
        Sample rate and number of features.
    tail : int
        Number of zeros to append to a stream.
    notes : sequence of str
        Paragraphs about this model.

    Returns
    -------
    str
        Markdown.

    Example
    -------
    >>> print(readme("zipformer_ctc", {"": "model.onnx"}, 16000, 80).splitlines()[0])
    # Speech recognition for sherpa-onnx
    """
    field, camel, owner = OWNERS[kind]
    server = f" --sample-rate={sample_rate} --input-sample-rate={sample_rate}" if sample_rate != 16000 else ""
    server += f" --feat-dim={feature_dim}" if feature_dim != 80 else ""
    client = f" Its clients need `--sample-rate={sample_rate}`." if sample_rate != 16000 else ""
    factory, model = kind, {"tokens": "tokens.txt"}
    if kind in TRANSDUCERS:
        factory = "transducer"
    else:
        files = {"model": files[""]}
    if kind == "transducer":  # otherwise the runtime reads the type from the metadata, except in Python
        model["model_type"] = "transducer"
    features = "" if kind == "omnilingual_asr_ctc" else f", sample_rate={sample_rate}, feature_dim={feature_dim}"
    cpp = {"model": 'config.model_config.{key} = "{value}";', "search": 'config.{key} = "{value}";'}
    cpp["files"] = f'config.model_config.{field}.{{key}} = "{{value}}";'
    python, kotlin, javascript = '{key}="{value}"', '{camel} = "{value}"', "{camel}: '{value}'"
    fill = {
        "notes": "".join(f"\n\n{note}" for note in notes),
        "kind": kind,
        "factory": factory,
        "rate": sample_rate,
        "dim": feature_dim,
        "tail": tail,
        "server": server,
        "client": client,
        "python": ",\n    ".join(_settings(files | model, python)) + features,
        "python_search": ", ".join(_settings(SEARCH | PIECES, python)),
        "cpp": "\n".join([*_settings(files, cpp["files"]), *_settings(model, cpp["model"])]),
        "cpp_search": " ".join([*_settings(SEARCH, cpp["search"]), *_settings(PIECES, cpp["model"])]),
        "kotlin_files": f"{camel} = {owner}({', '.join(_settings(files, kotlin))})",
        "kotlin_model": ", ".join(_settings(model, kotlin)),
        "kotlin_search": ", ".join(_settings(SEARCH, kotlin)),
        "kotlin_pieces": ", ".join(_settings(PIECES, kotlin)),
        "javascript_files": f"{camel}: {{{', '.join(_settings(files, javascript))}}}",
        "javascript_model": ", ".join(_settings(model, javascript)),
        "javascript_search": ", ".join(_settings(SEARCH, javascript)),
        "javascript_pieces": ", ".join(_settings(PIECES, javascript)),
        "seconds": f"{-(-100 * tail // sample_rate) / 100:.2f}",
    }
    text = _HEAD + (_STREAMS if kind in STREAMS else _WHOLE) + (_HOTWORDS if kind in TRANSDUCERS else "")
    for name, value in fill.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def _settings(values, form):
    """Settings in the syntax of a language, with names in snake case or camel case."""
    for key, value in values.items():
        first, *others = key.split("_")
        yield form.format(key=key, camel=first + "".join(map(str.capitalize, others)), value=value)


_HOTWORDS = """
## Hotwords

The search above is greedy. A beam search takes hotwords, or none if their file is left out. `hotwords.txt` has one hotword per
line, spelled as the model's texts are, optionally with a score: `SHERPA ONNX :2.0`. Keep it in another folder: a new export
replaces this one. For hotwords of one stream, use `create_stream(hotwords="ONE/ANOTHER ONE")`; if the model has no pieces for one
of them, that stream has none. Both searches write at most one token per frame of 0.04 s. Add these settings:

* Python: `@python_search@`
* C++: `@cpp_search@`
* Kotlin: `@kotlin_search@`, and in `modelConfig` `@kotlin_pieces@`
* JavaScript: `@javascript_search@`, and in `modelConfig` `@javascript_pieces@`
"""

_HEAD = f"""# Speech recognition for sherpa-onnx

{WRITTEN_BY} for sherpa-onnx 1.12.26 or later, type of model `@kind@`.
Samples are floats in [-1, 1] of one channel; sherpa-onnx resamples other rates than @rate@ Hz. Keep the provider `cpu`.

The unknown token is written as ` ⁇`, without the space after it that Python writes.@notes@

"""

_WHOLE = """Python (`pip install sherpa-onnx soundfile`):

```python
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OfflineRecognizer.from_@factory@(
    @python@,
)
samples, rate = soundfile.read("speech.wav", dtype="float32", always_2d=True)
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples[:, 0])  # the first channel
recognizer.decode_stream(stream)
print(stream.result.text)
```

C++ (`sherpa-onnx/c-api/cxx-api.h`):

```cpp
using namespace sherpa_onnx::cxx;
OfflineRecognizerConfig config;
config.feat_config.sample_rate = @rate@;
config.feat_config.feature_dim = @dim@;
@cpp@
OfflineRecognizer recognizer = OfflineRecognizer::Create(config);
Wave wave = ReadWave("speech.wav");
OfflineStream stream = recognizer.CreateStream();
stream.AcceptWaveform(wave.sample_rate, wave.samples.data(), wave.samples.size());
recognizer.Decode(&stream);
std::cout << recognizer.GetResult(&stream).text << "\\n";
```

Kotlin:

```kotlin
val config = OfflineRecognizerConfig(
    featConfig = FeatureConfig(sampleRate = @rate@, featureDim = @dim@),
    modelConfig = OfflineModelConfig(
        @kotlin_files@,
        @kotlin_model@,
    ),
)
val recognizer = OfflineRecognizer(config = config)  // with assetManager in an app
val stream = recognizer.createStream()
stream.acceptWaveform(samples, sampleRate = rate)
recognizer.decode(stream)
println(recognizer.getResult(stream).text)
```

JavaScript (`npm install sherpa-onnx-node`):

```javascript
const sherpa = require('sherpa-onnx-node');
const recognizer = new sherpa.OfflineRecognizer({
  featConfig: {sampleRate: @rate@, featureDim: @dim@},
  modelConfig: {
    @javascript_files@,
    @javascript_model@,
  },
});
const wave = sherpa.readWave('speech.wav');
const stream = recognizer.createStream();
stream.acceptWaveform({sampleRate: wave.sampleRate, samples: wave.samples});
recognizer.decode(stream);
console.log(recognizer.getResult(stream).text);
```
"""

_STREAMS = """**The end of a stream.** sherpa-onnx drops an incomplete last chunk. Give it @seconds@ s of
zeros (@tail@ samples at @rate@ Hz) before `input_finished`, or the last words are lost. For the websocket server, use
`--end-tail-padding=@seconds@@server@`.@client@

**The rate of a stream.** All samples of a stream have the same rate, zeros included; sherpa-onnx ends the process otherwise.

**The beginning of a text.** sherpa-onnx removes punctuation there, such as that of `'TIS`; the tokens still have it.

**Endpoints.** With endpoint detection, call `reset` if `is_endpoint` is true; the model then starts a new segment.

Python (`pip install sherpa-onnx soundfile`):

```python
import numpy
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OnlineRecognizer.from_@factory@(
    @python@,
)
samples, rate = soundfile.read("speech.wav", dtype="float32", always_2d=True)
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples[:, 0])  # the first channel, or its pieces one by one
stream.accept_waveform(rate, numpy.zeros(int(@seconds@ * rate), "float32"))
stream.input_finished()
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(recognizer.get_result(stream))
```

C++ (`sherpa-onnx/c-api/cxx-api.h`):

```cpp
using namespace sherpa_onnx::cxx;
OnlineRecognizerConfig config;
config.feat_config.sample_rate = @rate@;
config.feat_config.feature_dim = @dim@;
@cpp@
OnlineRecognizer recognizer = OnlineRecognizer::Create(config);
Wave wave = ReadWave("speech.wav");
std::vector<float> tail(static_cast<size_t>(@seconds@ * wave.sample_rate));  // zeros
OnlineStream stream = recognizer.CreateStream();
stream.AcceptWaveform(wave.sample_rate, wave.samples.data(), wave.samples.size());
stream.AcceptWaveform(wave.sample_rate, tail.data(), tail.size());
stream.InputFinished();
while (recognizer.IsReady(&stream)) recognizer.Decode(&stream);
std::cout << recognizer.GetResult(&stream).text << "\\n";
```

Kotlin:

```kotlin
val config = OnlineRecognizerConfig(
    featConfig = FeatureConfig(sampleRate = @rate@, featureDim = @dim@),
    modelConfig = OnlineModelConfig(
        @kotlin_files@,
        @kotlin_model@,
    ),
)
val recognizer = OnlineRecognizer(config = config)  // with assetManager in an app
val stream = recognizer.createStream()
stream.acceptWaveform(samples, sampleRate = rate)
stream.acceptWaveform(FloatArray((@seconds@ * rate).toInt()), sampleRate = rate)
stream.inputFinished()
while (recognizer.isReady(stream)) recognizer.decode(stream)
println(recognizer.getResult(stream).text)
```

JavaScript (`npm install sherpa-onnx-node`):

```javascript
const sherpa = require('sherpa-onnx-node');
const recognizer = new sherpa.OnlineRecognizer({
  featConfig: {sampleRate: @rate@, featureDim: @dim@},
  modelConfig: {
    @javascript_files@,
    @javascript_model@,
  },
});
const wave = sherpa.readWave('speech.wav');
const stream = recognizer.createStream();
stream.acceptWaveform({sampleRate: wave.sampleRate, samples: wave.samples});
const tail = new Float32Array(Math.floor(@seconds@ * wave.sampleRate)); // zeros
stream.acceptWaveform({sampleRate: wave.sampleRate, samples: tail});
stream.inputFinished();
while (recognizer.isReady(stream)) recognizer.decode(stream);
console.log(recognizer.getResult(stream).text);
```
"""
