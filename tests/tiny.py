"""A corpus and a model so small that a whole training run takes seconds."""

import numpy as np
import soundfile

SENTENCES = ["THE CAT SAT", "A HAT AND A CAT", "THE TEA IS HOT", "A HOT DAY", "SHE HAS A HAT", "THE DAY IS SAD"]
UTTERANCES = {"train-tiny": 12, "dev-tiny": 2, "test-tiny": 2}

# For any hparams file: keys as on the command line.
SMALL = {
    "train_splits": "[train-tiny]",
    "dev_split": "dev-tiny",
    "test_splits": "[test-tiny]",
    "number_of_epochs": "1",
    "grad_accumulation_factor": "1",
    "num_workers": "0",
    "vocab_size": "30",
    "d_model": "16",
    "nhead": "2",
    "num_encoder_layers": "2",
    "num_decoder_layers": "1",
    "d_ffn": "32",
    "warmup_steps": "10",
    "test_search": "{beam_size: 2}",
}


def make_corpus(folder):
    """Tones with noise and sentences, in LibriSpeech layout; an utterance is 0.8 to 1.4 seconds long."""
    generator = np.random.default_rng(0)
    for speaker, (split, count) in enumerate(UTTERANCES.items(), 1):
        chapter = folder / split / str(speaker) / "1"
        chapter.mkdir(parents=True)
        lines = []
        for index in range(count):
            name = f"{speaker}-1-{index:04d}"
            time = np.arange(int(16000 * generator.uniform(0.8, 1.4))) / 16000
            tone = np.sin(2 * np.pi * generator.uniform(100, 3000) * time) + 0.1 * generator.standard_normal(len(time))
            soundfile.write(chapter / f"{name}.flac", 0.1 * tone, 16000)
            lines.append(f"{name} {SENTENCES[index % len(SENTENCES)]}\n")
        (chapter / f"{speaker}-1.trans.txt").write_text("".join(lines))
    return folder


def arguments(**keys):
    """Keys as a list of command line arguments."""
    return [text for key, value in keys.items() for text in (f"--{key}", str(value))]
