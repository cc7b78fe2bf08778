// Sends the microphone's samples to the page in pieces of 1024. On any message from the page it sends the rest, then null.

class Microphone extends AudioWorkletProcessor {
  piece = new Float32Array(1024);
  filled = 0;

  constructor() {
    super();
    this.port.onmessage = () => {
      this.#send();
      this.port.postMessage(null);
    };
  }

  #send() {
    if (this.filled) this.port.postMessage(this.piece.slice(0, this.filled));
    this.filled = 0;
  }

  process([channels]) {
    const samples = channels[0] ?? [];
    for (const sample of samples) {
      this.piece[this.filled++] = sample;
      if (this.filled === this.piece.length) this.#send();
    }
    return true;
  }
}

registerProcessor('microphone', Microphone);
