// The page: transcribes the microphone or a file.

import {Recognizer} from './recognizer.js';

const find = (id) => document.getElementById(id);
const [microphone, file, copy, wave, words, status, facts] = ['microphone', 'file', 'copy', 'wave', 'words', 'status', 'facts'].map(find);
const MODEL = new URLSearchParams(location.search).get('model') ?? 'model.onnx';
const PIECE = 0.5; // seconds of a file between two updates of the page
const LEVELS_PER_SECOND = 25;

let recognizer;
let recording; // a function that closes the microphone, while it is open
let levels = [];

const say = (text, isError = false) => {
  status.textContent = text;
  status.classList.toggle('error', isError);
};

/** Disable the controls while something runs, except the button that stops the microphone. */
function setBusy(busy) {
  microphone.disabled = busy && !recording;
  file.disabled = busy;
  file.parentElement.classList.toggle('disabled', busy);
  copy.disabled = busy || !recognizer?.tokens.length;
  document.body.toggleAttribute('data-busy', busy);
  draw();
}

function begin() {
  recognizer.reset();
  levels = [];
  show();
  setBusy(true);
}

async function accept(samples) {
  const size = Math.round(recognizer.sampleRate / LEVELS_PER_SECOND);
  for (let start = 0; start < samples.length; start += size) {
    levels.push(samples.subarray(start, start + size).reduce((most, sample) => Math.max(most, Math.abs(sample)), 0));
  }
  await recognizer.accept(samples);
  show();
}

async function finish() {
  await recognizer.finish();
  show();
  const {seconds, computing} = recognizer;
  const times = (seconds / computing).toFixed(seconds / computing < 10 ? 1 : 0);
  say(seconds ? `${seconds.toFixed(1)} s of audio in ${computing.toFixed(2)} s: ${times} times as fast as speech.` : 'There was no audio.');
  if (!recognizer.tokens.length) words.replaceChildren(paragraph('', 'No words were recognised.', 'empty'));
}

/** Show lines of words; all but the last are final. Only new text is appended to a line, because screen readers then read only that. */
function show() {
  const parts = recognizer.parts();
  while (words.children.length > parts.length) words.lastElementChild.remove();
  const last = Math.max(0, words.children.length - 1);
  parts.slice(last).forEach(({time, text}, i) => {
    const line = words.children[last + i] ?? words.appendChild(paragraph(clock(time), ''));
    const content = line.lastElementChild;
    const before = content.textContent;
    if (text.startsWith(before)) content.append(text.slice(before.length));
    else content.textContent = text;
  });
  words.scrollTop = words.scrollHeight;
  draw();
}

function paragraph(time, text, name = '') {
  const [line, stamp, content] = ['p', 'time', 'span'].map((tag) => document.createElement(tag));
  line.className = name;
  stamp.textContent = time;
  content.textContent = text;
  line.append(stamp, content);
  return line;
}

const clock = (time) => `${Math.floor(time / 60)}:${String(Math.floor(time % 60)).padStart(2, '0')}`;

/** Draw the loudness as bars: of the last seconds while something runs, and of the whole audio at the end. */
function draw() {
  const scale = devicePixelRatio;
  const [width, height] = [wave.clientWidth * scale, wave.clientHeight * scale];
  if (wave.width !== width || wave.height !== height) Object.assign(wave, {width, height});
  const canvas = wave.getContext('2d');
  canvas.clearRect(0, 0, width, height);
  canvas.fillStyle = getComputedStyle(wave).color;
  const bar = 4 * scale;
  const most = Math.floor(width / bar);
  const group = document.body.hasAttribute('data-busy') ? 1 : Math.ceil(levels.length / most);
  const loudest = (_, i) => Math.max(...levels.slice(i * group, (i + 1) * group));
  const shown = group > 1 ? Array.from({length: Math.ceil(levels.length / group)}, loudest) : levels.slice(-most);
  shown.forEach((level, i) => {
    const tall = Math.max(scale, Math.min(1, Math.sqrt(level)) * height);
    canvas.fillRect(i * bar, (height - tall) / 2, bar / 2, tall);
  });
}

async function transcribe(chosen) {
  begin();
  try {
    say(`Transcribing ${chosen.name} …`);
    const samples = await decode(chosen);
    const size = Math.round(PIECE * recognizer.sampleRate);
    for (let start = 0; start < samples.length; start += size) {
      await accept(samples.subarray(start, start + size));
      await new Promise((resolve) => setTimeout(resolve)); // lets the browser update the page
    }
    await finish();
  } catch (error) {
    say(error.message, true);
  }
  setBusy(false);
}

/** The samples of a file at the model's rate, as the mean of its channels. */
async function decode(chosen) {
  const context = new OfflineAudioContext(1, 1, recognizer.sampleRate);
  let audio;
  try {
    audio = await context.decodeAudioData(await chosen.arrayBuffer());
  } catch {
    throw new Error(`${chosen.name} is not audio that this browser can read.`);
  }
  const channels = Array.from({length: audio.numberOfChannels}, (_, i) => audio.getChannelData(i));
  return channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
}

async function record() {
  if (!navigator.mediaDevices) {
    say('The microphone needs HTTPS, or a page at localhost.', true);
    return;
  }
  let stream, context;
  setBusy(true); // the browser asks for permission, and a second click would open the microphone again
  try {
    stream = await navigator.mediaDevices.getUserMedia({audio: {channelCount: 1}});
    context = new AudioContext({sampleRate: recognizer.sampleRate});
    await context.audioWorklet.addModule('microphone.js');
    const node = new AudioWorkletNode(context, 'microphone', {numberOfOutputs: 0});
    const source = context.createMediaStreamSource(stream);
    let turn = Promise.resolve(); // pieces are processed one by one
    let ended;
    const rest = new Promise((resolve) => (ended = resolve));
    node.port.onmessage = ({data}) => {
      if (!data) return ended();
      turn = turn.then(() => accept(data));
      turn.catch(() => recording && stop()); // which says what was wrong
    };
    recording = async () => {
      source.disconnect();
      node.port.postMessage('end');
      await rest;
      stream.getTracks().forEach((track) => track.stop());
      await context.close();
      await turn;
    };
    begin();
    source.connect(node);
    const [track] = stream.getAudioTracks();
    track.onended = () => recording && stop(); // for example unplugged
    if (track.readyState === 'ended') throw new Error('it has ended.');
    microphone.textContent = 'Stop';
    microphone.setAttribute('aria-pressed', 'true');
    say('Listening …');
  } catch (error) {
    stream?.getTracks().forEach((track) => track.stop());
    await context?.close();
    recording = undefined;
    setBusy(false);
    say(`The microphone cannot be used: ${error.message}`, true);
  }
}

async function stop() {
  const end = recording;
  recording = undefined;
  setBusy(true);
  say('Finishing …');
  microphone.textContent = 'Microphone';
  microphone.setAttribute('aria-pressed', 'false');
  try {
    await end();
    await finish();
  } catch (error) {
    say(error.message, true);
  }
  setBusy(false);
}

microphone.addEventListener('click', () => (recording ? stop() : record()));
file.addEventListener('change', async () => {
  if (file.files.length && !file.disabled) await transcribe(file.files[0]);
  file.value = ''; // so that the same file can be chosen again
});
copy.addEventListener('click', async () => {
  try {
    await navigator.clipboard.writeText(recognizer.parts().map(({text}) => text).join('\n'));
    say('Copied.');
  } catch {
    say('This browser copies only from pages with HTTPS, or at localhost, and with permission; select the text and copy it.', true);
  }
});
document.addEventListener('dragover', (event) => event.preventDefault());
document.addEventListener('drop', (event) => {
  event.preventDefault();
  const [dropped] = event.dataTransfer.files;
  if (dropped && !file.disabled) transcribe(dropped);
});
addEventListener('resize', draw);

try {
  say('Loading the model …');
  recognizer = await Recognizer.load(MODEL);
  const {encoder, bytes, chunkSeconds, sampleRate} = recognizer;
  const about = [encoder, `${(bytes / 2 ** 20).toFixed(1)} MiB`, `chunks of ${chunkSeconds.toFixed(2)} s`, `${sampleRate / 1000} kHz`];
  facts.replaceChildren(...about.map((text) => Object.assign(document.createElement('li'), {textContent: text})));
  say('Ready. Speak, open a file, or drop one here.');
  setBusy(false);
} catch (error) {
  say(error.message, true);
  find('how').hidden = false;
}
