"""Time of a language model in the joint search: SpeechBrain's scorer, which computes the whole text for each token, and ours.

    python benchmarks/lm.py [--device cuda] [--threads N] [--hypotheses 10 66] [--tokens 30]
        [--output benchmarks/results/lm.csv]

The TransformerLM of SpeechBrain's LibriSpeech recipes (12 layers of 768, 5000 tokens) with random weights. At each token, each
hypothesis extends a random one.
"""

import argparse
import time
from pathlib import Path

import torch
from speechbrain.decoders import scorer
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM

from speechbrain_ext.decoders.lm import LM_TEMPERATURE, TransformerLMScorer
from speechbrain_ext.utils.files import write_csv
from speechbrain_ext.utils.machine import describe_machine
from speechbrain_ext.utils.measure import synchronize

FIELDS = ("scorer", "hypotheses", "tokens", "machine", "seconds", "times_as_fast", "largest_difference")
VOCAB = 5000


@torch.no_grad()
def run(scores, tokens, orders):
    """Run a scorer; returns seconds, and the log-probabilities of each step."""
    memory, answers = None, []
    began = time.perf_counter()
    for token, order in zip(tokens, orders, strict=True):
        log_probs, memory = scores.score(token, memory, None, None)
        memory = scores.permute_mem(memory, order)
        answers.append(log_probs)
    synchronize(tokens.device)
    return time.perf_counter() - began, torch.stack(answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hypotheses", type=int, nargs="+", default=[10, 66])
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lm.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = {"d_model": 768, "nhead": 12, "num_encoder_layers": 12, "d_ffn": 3072, "dropout": 0.0, "activation": torch.nn.GELU}
    lm, rows = TransformerLM(VOCAB, **sizes).eval().to(arguments.device), []
    for count in arguments.hypotheses:
        size = arguments.tokens, count
        tokens = torch.randint(1, VOCAB, size).to(arguments.device)
        orders = torch.randint(count, size).to(arguments.device)
        found = {}
        for name, module in (("SpeechBrain", scorer.TransformerLMScorer), ("here", TransformerLMScorer)):
            scores = module(lm, LM_TEMPERATURE)
            run(scores, tokens[:2], orders[:2])
            found[name] = run(scores, tokens, orders)
        theirs, expected = found["SpeechBrain"]
        for name, (seconds, answers) in found.items():
            difference = f"{(answers - expected).abs().max().item():.1e}"
            machine = describe_machine(arguments.device)["hardware"]
            rows.append([name, count, arguments.tokens, machine, round(seconds, 2), round(theirs / seconds, 1), difference])
            print(", ".join(f"{field} {value}" for field, value in zip(FIELDS, rows[-1], strict=True)), flush=True)
    write_csv(arguments.output, FIELDS, rows)


if __name__ == "__main__":
    main()
