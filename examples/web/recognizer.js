// Runs a model of `python -m speechbrain_ext export --streaming` chunk by chunk, from samples to words.

import * as ort from './node_modules/onnxruntime-web/dist/ort.wasm.min.mjs';

ort.env.wasm.numThreads = 1; // more threads need headers that a static server does not send

const ARRAYS = {float32: Float32Array, float64: Float64Array, int64: BigInt64Array};
const FORMAT = 'speechbrain_ext';
const PAUSE = 1.0; // seconds without a token, after which a part of the text ends
const MOST = 5; // tokens that a transducer may write in a frame
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

/** Load an ONNX file, such as a part of a transducer; returns {about, bytes, session}, or undefined if there is none. */
async function open(url, part) {
  const response = await fetch(url);
  if (!response.ok) return undefined;
  const bytes = new Uint8Array(await response.arrayBuffer());
  const about = metadataOf(bytes);
  if (about.format !== FORMAT || !(part ? about.part === part : about.mode === 'streaming')) {
    throw new Error(`${url} is not from "python -m ${FORMAT} export --streaming"; export the model with this command.`);
  }
  try {
    return {about, bytes: bytes.length, session: await ort.InferenceSession.create(bytes)};
  } catch (error) {
    throw new Error(`${url} cannot be loaded (${error.message}); export the model again, or reload the page.`);
  }
}

/** The index of the largest number. */
const largest = (scores) => scores.indexOf(scores.reduce((most, score) => Math.max(most, score)));

/** A part of a row of numbers as a tensor with one row. */
const row = (data, index, size) => new ort.Tensor('float32', data.slice(index * size, (index + 1) * size), [1, size]);

export class Recognizer {
  /** Load a model, or the encoder, decoder and joiner of a transducer; throws an Error if that is not possible. */
  static async load(url) {
    const named = url.replace(/(\.onnx)?$/, '-encoder$1'); // the export names a transducer's encoder so
    let from = url;
    const model = (await open(url)) ?? (await open((from = named)));
    if (!model) throw new Error(`There is no ${url} next to this page.`);
    if (model.about.head !== 'transducer') return new Recognizer(model);
    const encoder = /encoder(\.onnx)?$/;
    const files = ['decoder', 'joiner'].map((part) => (encoder.test(from) ? from : named).replace(encoder, `${part}$1`));
    const parts = await Promise.all([open(files[0], 'decoder'), open(files[1], 'joiner')]);
    const missing = files.find((_, i) => !parts[i]);
    if (missing) throw new Error(`There is no ${missing} next to this page; a transducer needs its encoder, decoder and joiner.`);
    return new Recognizer(model, ...parts);
  }

  constructor({session, about, bytes}, decoder, joiner) {
    this.session = session;
    this.bytes = [decoder, joiner].reduce((sum, part) => sum + (part?.bytes ?? 0), bytes);
    this.output = about.output ?? 'log_probs';
    if (decoder) {
      this.decoder = decoder.session;
      this.joiner = joiner.session;
      this.context = Number(decoder.about.context_size);
      this.memory = decoder.about.state_shape && JSON.parse(decoder.about.state_shape); // of an LSTM
    }
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
    this.predicted = undefined; // the decoder's outputs for the last tokens of a transducer
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
    await (this.decoder ? this.#searchTransducer(found[this.output]) : this.#search(found[this.output]));
    this.computing += (performance.now() - began) / 1000;
  }

  /** The best token of each frame, without blanks and repetitions. */
  #search({data, dims: [, frames, size]}) {
    for (let frame = 0; frame < frames; frame++, this.frames++) {
      const token = largest(data.subarray(frame * size, (frame + 1) * size));
      if (token !== this.blank && token !== this.last) this.#write(token);
      this.last = token;
    }
  }

  /** The best tokens of each frame, until the blank is the best. */
  async #searchTransducer({data, dims: [, frames, size]}) {
    this.predicted ??= await this.#predict();
    for (let frame = 0; frame < frames; frame++, this.frames++) {
      const encoder_out = row(data, frame, size);
      for (let i = 0; i < MOST; i++) {
        const {logit} = await this.joiner.run({encoder_out, decoder_out: this.predicted.decoder_out});
        const token = largest(logit.data);
        if (token === this.blank) break;
        this.#write(token);
        this.predicted = await this.#predict(token);
      }
    }
  }

  /** Run a transducer's decoder with one more token, or for the beginning of the text. */
  async #predict(token) {
    const before = this.predicted;
    const y = new BigInt64Array(this.context).fill(BigInt(this.blank));
    if (before) {
      y.set(before.y.subarray(1));
      y[y.length - 1] = BigInt(token);
    }
    const given = {y: new ort.Tensor('int64', y, [1, y.length])};
    for (const name of this.memory ? ['hidden', 'cell'] : []) {
      const sizes = [1, ...this.memory];
      given[name] = before?.[`next.${name}`] ?? new ort.Tensor('float32', new Float32Array(sizes.reduce((a, b) => a * b)), sizes);
    }
    return {y, ...(await this.decoder.run(given))};
  }

  #write(token) {
    this.tokens.push({symbol: this.symbols[token], time: this.frames * this.secondsPerFrame});
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
