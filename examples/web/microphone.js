// Sends the microphone's samples to the page in pieces of 1024.

class Microphone extends AudioWorkletProcessor {
  piece = new Float32Array(1024);
  filled = 0;

  process([channels]) {
    const samples = channels[0] ?? [];
    for (const sample of samples) {
      this.piece[this.filled++] = sample;
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor('microphone', Microphone);
