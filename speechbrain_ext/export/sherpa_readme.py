"""The README of a folder for sherpa-onnx, with example code."""

from speechbrain_ext.export.sherpa_texts import STREAMS, TRANSDUCERS

OWNERS = {
    "zipformer_ctc": ("zipformer_ctc", "zipformerCtc", "OfflineZipformerCtcModelConfig"),
    "omnilingual_asr_ctc": ("omnilingual", "omnilingual", "OfflineOmnilingualAsrCtcModelConfig"),
    "zipformer2_ctc": ("zipformer2_ctc", "zipformer2Ctc", "OnlineZipformer2CtcModelConfig"),
    "transducer": ("transducer", "transducer", "OfflineTransducerModelConfig"),
    "zipformer2": ("transducer", "transducer", "OnlineTransducerModelConfig"),
}
"""The setting with the model's path: its field in C++, its field in Kotlin and JavaScript, and its class in Kotlin."""


def readme(kind, files, sample_rate, feature_dim, tail=0):
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
    if kind in TRANSDUCERS:
        factory = "transducer"
        search = {"decoding_method": "modified_beam_search", "hotwords_file": "hotwords.txt"}
        model = {"tokens": "tokens.txt", "modeling_unit": "bpe", "bpe_vocab": "bpe.vocab"}
    else:
        factory, files, search, model = kind, {"model": files[""]}, {}, {"tokens": "tokens.txt"}
    features = "" if kind == "omnilingual_asr_ctc" else f", sample_rate={sample_rate}, feature_dim={feature_dim}"
    cpp = [(files, f'config.model_config.{field}.{{key}} = "{{value}}";'), (model, 'config.model_config.{key} = "{value}";')]
    cpp.append((search, 'config.{key} = "{value}";'))
    kotlin, javascript = '{camel} = "{value}"', "{camel}: '{value}'"
    fill = {
        "search": _HOTWORDS if search else "The search is greedy.",
        "kind": kind,
        "factory": factory,
        "rate": sample_rate,
        "dim": feature_dim,
        "tail": tail,
        "python": ",\n    ".join(_settings(files | model, '{key}="{value}"')) + features,
        "python_search": "".join(_settings(search, '\n    {key}="{value}",')),
        "cpp": "\n".join(line for values, form in cpp for line in _settings(values, form)),
        "kotlin_files": f"{camel} = {owner}({', '.join(_settings(files, kotlin))})",
        "kotlin_model": ", ".join(_settings(model, kotlin)),
        "kotlin_search": "".join(_settings(search, f"\n    {kotlin},")),
        "javascript_files": f"{camel}: {{{', '.join(_settings(files, javascript))}}}",
        "javascript_model": ", ".join(_settings(model, javascript)),
        "javascript_search": "".join(_settings(search, f"\n  {javascript},")),
        "seconds": f"{tail / sample_rate:.2f}",
    }
    text = _HEAD + (_STREAMS if kind in STREAMS else _WHOLE)
    for name, value in fill.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def _settings(values, form):
    """Settings in the syntax of a language, with names in snake case or camel case."""
    for key, value in values.items():
        first, *others = key.split("_")
        yield form.format(key=key, camel=first + "".join(map(str.capitalize, others)), value=value)


_HOTWORDS = """The search is a beam search with hotwords. `hotwords.txt` has one hotword per line, spelled as the model's texts
are, optionally with a score: `SHERPA ONNX :2.0`. For hotwords of one stream, use `create_stream(hotwords="ONE/ANOTHER ONE")`. To
search without hotwords, leave out the file; for greedy search, also leave out the decoding method. Both searches write at most
one token per frame of 0.04 s."""

_HEAD = """# Speech recognition for sherpa-onnx

Written by `speechbrain_ext export --runtime sherpa-onnx` for sherpa-onnx 1.12.26 or later, type of model `@kind@`. Samples are
floats in [-1, 1]; sherpa-onnx resamples other rates than @rate@ Hz. Keep the provider `cpu`.

@search@

"""

_WHOLE = """Python (`pip install sherpa-onnx soundfile`):

```python
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OfflineRecognizer.from_@factory@(
    @python@,@python_search@
)
samples, rate = soundfile.read("speech.wav", dtype="float32")
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples)
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
    ),@kotlin_search@
)
val recognizer = OfflineRecognizer(config = config)  // with assetManager in an app
val stream = recognizer.createStream()
stream.acceptWaveform(samples, sampleRate = @rate@)
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
  },@javascript_search@
});
const wave = sherpa.readWave('speech.wav');
const stream = recognizer.createStream();
stream.acceptWaveform({sampleRate: wave.sampleRate, samples: wave.samples});
recognizer.decode(stream);
console.log(recognizer.getResult(stream).text);
```
"""

_STREAMS = """**The end of a stream.** sherpa-onnx drops an incomplete last chunk. Give it @seconds@ s of zeros (@tail@ samples)
before `input_finished`, or the last words are lost. For the websocket server, use `--end-tail-padding=@seconds@`.

**The beginning of a text.** sherpa-onnx removes punctuation there, such as that of `'TIS`; the tokens still have it.

**Endpoints.** With endpoint detection, call `reset` if `is_endpoint` is true; the model then starts a new segment.

Python (`pip install sherpa-onnx soundfile`):

```python
import numpy
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OnlineRecognizer.from_@factory@(
    @python@,@python_search@
)
samples, rate = soundfile.read("speech.wav", dtype="float32")
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples)  # or piece by piece
stream.accept_waveform(@rate@, numpy.zeros(@tail@, "float32"))
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
std::vector<float> tail(@tail@);
OnlineStream stream = recognizer.CreateStream();
stream.AcceptWaveform(wave.sample_rate, wave.samples.data(), wave.samples.size());
stream.AcceptWaveform(@rate@, tail.data(), tail.size());
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
    ),@kotlin_search@
)
val recognizer = OnlineRecognizer(config = config)  // with assetManager in an app
val stream = recognizer.createStream()
stream.acceptWaveform(samples, sampleRate = @rate@)
stream.acceptWaveform(FloatArray(@tail@), sampleRate = @rate@)
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
  },@javascript_search@
});
const wave = sherpa.readWave('speech.wav');
const stream = recognizer.createStream();
stream.acceptWaveform({sampleRate: wave.sampleRate, samples: wave.samples});
stream.acceptWaveform({sampleRate: @rate@, samples: new Float32Array(@tail@)});
while (recognizer.isReady(stream)) recognizer.decode(stream);
console.log(recognizer.getResult(stream).text);
```
"""
