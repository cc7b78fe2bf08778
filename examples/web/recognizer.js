// Runs a model of `python -m speechbrain_ext export --streaming` chunk by chunk, from samples to words.

import * as ort from './node_modules/onnxruntime-web/dist/ort.wasm.min.mjs';

ort.env.wasm.numThreads = 1; // more threads need headers that a static server does not send

const ARRAYS = {float32: Float32Array, float64: Float64Array, int64: BigInt64Array};
const FORMAT = 'speechbrain_ext';
const PAUSE = 1.0; // seconds without a token, after which a part of the text ends
const METADATA_PROPS = 14; // number of this field in ONNX's ModelProto

/** Read the metadata of an ONNX file from its protocol buffer, because onnxruntime-web does not give access to it. */
export function metadataOf(bytes) {
  const about = {};
  for (const [field, value] of fieldsOf(bytes)) {
    if (field === METADATA_PROPS) {
      const entry = new Map(fieldsOf(value));
      const [key, text] = [1, 2].map((part) => new TextDecoder().decode(entry.get(part)));
      about[key] = text;
    }
  }
  return about;
}

function* fieldsOf(bytes) {
  let place = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[place++];
      value += (byte & 127) * scale;
      if (!(byte & 128)) return value;
    }
  };
  while (place < bytes.length) {
    const tag = varint();
    const kind = tag & 7;
    const size = kind === 2 ? varint() : {1: 8, 5: 4}[kind];
    if (size === undefined) {
      varint(); // a number
      continue;
    }
    yield [Math.floor(tag / 8), bytes.subarray(place, place + size)];
    place += size;
  }
}

export class Recognizer {
  /** Load a model; throws an Error if that is not possible. */
  static async load(url) {
    const response = await fetch(url);
    const transducer = `${url} is of a transducer, which this page does not search; export a model without one.`;
    if (!response.ok) {
      // the export writes a transducer's encoder with this name
      const encoder = await fetch(url.replace(/(\.onnx)?$/, '-encoder$1'), {method: 'HEAD'});
      throw new Error(encoder.ok ? transducer : `There is no ${url} next to this page.`);
    }
    const bytes = new Uint8Array(await response.arrayBuffer());
    const about = metadataOf(bytes);
    if (about.format === FORMAT && about.head === 'transducer') throw new Error(transducer);
    if (about.format !== FORMAT || about.mode !== 'streaming') {
      throw new Error(`${url} is not from "python -m ${FORMAT} export --streaming"; export the model with this command.`);
    }
    let session;
    try {
      session = await ort.InferenceSession.create(bytes);
    } catch (error) {
      throw new Error(`${url} cannot be loaded (${error.message}); export the model again, or reload the page.`);
    }
    return new Recognizer(session, about, bytes.length);
  }

  constructor(session, about, bytes) {
    this.session = session;
    this.bytes = bytes;
    this.encoder = about.encoder;
    this.sampleRate = Number(about.sample_rate);
    this.secondsPerFrame = Number(about.seconds_per_frame);
    this.blank = Number(about.blank_index);
    this.symbols = JSON.parse(about.tokens);
    this.states = JSON.parse(about.state);
    const names = ['window', 'before', 'hop_length', 'chunk_step', 'chunk_samples'];
    [this.window, this.before, this.hop, this.step, this.size] = names.map((name) => Number(about[name]));
    this.mirrors = about.ends === 'mirrored';
    this.reset();
  }

  /** Seconds of audio per chunk. */
  get chunkSeconds() {
    return this.step / this.sampleRate;
  }

  /** Seconds of audio so far. */
  get seconds() {
    return this.received / this.sampleRate;
  }

  /** Begin a stream. */
  reset() {
    this.kept = new Float32Array(0); // the samples from index `from` on
    this.from = this.received = this.chunk = this.frames = this.computing = 0;
    this.last = this.blank;
    this.tokens = []; // {symbol, time}
    this.written = []; // the parts of the first `read` tokens
    this.read = 0;
    this.given = {};
    for (const {input, shape, type} of this.states) {
      const sizes = shape.map((size) => (size === 'batch' ? 1 : size));
      const length = sizes.reduce((product, size) => product * size, 1);
      this.given[input] = new ort.Tensor(type, new ARRAYS[type](length), sizes);
    }
  }

  /** Process samples in [-1, 1]. */
  async accept(samples) {
    const joined = new Float32Array(this.kept.length + samples.length);
    joined.set(this.kept);
    joined.set(samples, this.kept.length);
    this.kept = joined;
    this.received += samples.length;
    while (this.received >= this.start + this.size) await this.#run(this.start + this.size);
    const from = Math.min(Math.max(0, this.start - this.window), this.received);
    this.kept = this.kept.slice(from - this.from);
    this.from = from;
  }

  /** End the stream, and process an incomplete last chunk. */
  async finish() {
    if (!this.received) return;
    const frames = Math.max(1, Math.floor((this.received + this.before - Math.floor(this.window / 2)) / this.hop) + 1);
    const end = (frames - 1) * this.hop + this.window - this.before; // end of the last frame's window
    while (this.chunk * this.step < frames * this.hop) await this.#run(Math.min(this.start + this.size, end));
  }

  /** Start of the next chunk's first window; that of the first chunk is before the first sample. */
  get start() {
    return this.chunk * this.step - this.before;
  }

  /** The sample at an index; outside the audio, zero or a mirrored sample. */
  #sample(number) {
    if (number < 0 || number >= this.received) {
      if (!this.mirrors) return 0;
      const period = 2 * this.received;
      number = ((number % period) + period) % period;
      if (number >= this.received) number = period - 1 - number;
    }
    return this.kept[number - this.from];
  }

  async #run(end) {
    const began = performance.now();
    const start = this.start;
    const waveform = Float32Array.from({length: end - start}, (_, i) => this.#sample(start + i));
    const found = await this.session.run({waveform: new ort.Tensor('float32', waveform, [1, waveform.length]), ...this.given});
    for (const {input, output} of this.states) this.given[input] = found[output];
    this.chunk += 1;
    this.#search(found.log_probs);
    this.computing += (performance.now() - began) / 1000;
  }

  /** The best token of each frame, without blanks and repetitions. */
  #search({data, dims: [, frames, size]}) {
    for (let frame = 0; frame < frames; frame++, this.frames++) {
      const scores = data.subarray(frame * size, (frame + 1) * size);
      const token = scores.indexOf(scores.reduce((most, score) => Math.max(most, score)));
      if (token !== this.blank && token !== this.last) {
        this.tokens.push({symbol: this.symbols[token], time: this.frames * this.secondsPerFrame});
      }
      this.last = token;
    }
  }

  /** The text so far: a list of {time, text}, divided at pauses. Only new tokens are read; all parts but the last are final. */
  parts() {
    for (; this.read < this.tokens.length; this.read++) {
      const {symbol, time} = this.tokens[this.read];
      const pause = time - this.tokens[this.read - 1]?.time;
      if (!this.written.length || (pause > PAUSE && symbol.startsWith('▁'))) {
        if (this.written.at(-1)?.text === '') this.written.pop();
        this.written.push({time, text: '', spaced: false});
      }
      const part = this.written.at(-1);
      for (const [i, word] of symbol.split('▁').entries()) {
        part.spaced ||= i > 0;
        if (!word) continue;
        part.text += part.spaced && part.text ? ` ${word}` : word;
        part.spaced = false;
      }
    }
    return this.written.at(-1)?.text === '' ? this.written.slice(0, -1) : this.written;
  }
}
