"""The README of a folder for sherpa-onnx: how programs call the model."""

OWNERS = {
    "zipformer_ctc": ("zipformer_ctc", "zipformerCtc", "OfflineZipformerCtcModelConfig"),
    "omnilingual_asr_ctc": ("omnilingual", "omnilingual", "OfflineOmnilingualAsrCtcModelConfig"),
    "zipformer2_ctc": ("zipformer2_ctc", "zipformer2Ctc", "OnlineZipformer2CtcModelConfig"),
}
"""What holds the model's path: the field in C++, the one in Kotlin and JavaScript, and its class in Kotlin."""


def readme(kind, file, sample_rate, feature_dim, tail=0):
    """Write it.

    Arguments
    ---------
    kind : str
        The runtime's type of model.
    file : str
        Name of the ONNX file.
    sample_rate, feature_dim : int
        Of the features.
    tail : int
        Of streams, zeros behind the end, in samples.

    Returns
    -------
    str
        Markdown.

    Example
    -------
    >>> print(readme("zipformer_ctc", "model.onnx", 16000, 80).splitlines()[0])
    # Speech recognition for sherpa-onnx
    """
    field, camel, owner = OWNERS[kind]
    fill = {
        "kind": kind,
        "file": file,
        "field": field,
        "camel": camel,
        "owner": owner,
        "rate": sample_rate,
        "dim": feature_dim,
        "tail": tail,
        "python": "" if kind == "omnilingual_asr_ctc" else f", sample_rate={sample_rate}, feature_dim={feature_dim}",
        "seconds": f"{tail / sample_rate:.2f}",
    }
    text = _HEAD + (_STREAMS if tail else _WHOLE)
    for name, value in fill.items():
        text = text.replace(f"@{name}@", str(value))
    return text


_HEAD = """# Speech recognition for sherpa-onnx

Written by `speechbrain_ext export --runtime sherpa-onnx` for sherpa-onnx 1.12.26 or later, type of model `@kind@`. The search is
greedy. Samples are floats in [-1, 1]; sherpa-onnx resamples other rates than @rate@ Hz. Keep the provider `cpu`.

"""

_WHOLE = """Python (`pip install sherpa-onnx soundfile`):

```python
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OfflineRecognizer.from_@kind@(model="@file@", tokens="tokens.txt"@python@)
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
config.model_config.@field@.model = "@file@";
config.model_config.tokens = "tokens.txt";
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
    modelConfig = OfflineModelConfig(@camel@ = @owner@(model = "@file@"), tokens = "tokens.txt"),
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
  modelConfig: {@camel@: {model: '@file@'}, tokens: 'tokens.txt'},
});
const wave = sherpa.readWave('speech.wav');
const stream = recognizer.createStream();
stream.acceptWaveform({sampleRate: wave.sampleRate, samples: wave.samples});
recognizer.decode(stream);
console.log(recognizer.getResult(stream).text);
```
"""

_STREAMS = """**The end of a stream.** sherpa-onnx drops what fills no chunk. Give it @seconds@ s of zeros (@tail@ samples) before
`input_finished`, or the last words are lost; with the websocket server, `--end-tail-padding=@seconds@`.

**The beginning of a text.** sherpa-onnx leaves punctuation out there, such as that of `'TIS`; the tokens have it.

**Endpoints.** With endpoint detection, call `reset` where `is_endpoint` says so: the model begins anew there.

Python (`pip install sherpa-onnx soundfile`):

```python
import numpy
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OnlineRecognizer.from_@kind@(model="@file@", tokens="tokens.txt"@python@)
samples, rate = soundfile.read("speech.wav", dtype="float32")
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples)  # or in pieces, as they come
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
config.model_config.@field@.model = "@file@";
config.model_config.tokens = "tokens.txt";
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
    modelConfig = OnlineModelConfig(@camel@ = @owner@(model = "@file@"), tokens = "tokens.txt"),
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
  modelConfig: {@camel@: {model: '@file@'}, tokens: 'tokens.txt'},
});
const wave = sherpa.readWave('speech.wav');
const stream = recognizer.createStream();
stream.acceptWaveform({sampleRate: wave.sampleRate, samples: wave.samples});
stream.acceptWaveform({sampleRate: @rate@, samples: new Float32Array(@tail@)});
while (recognizer.isReady(stream)) recognizer.decode(stream);
console.log(recognizer.getResult(stream).text);
```
"""
