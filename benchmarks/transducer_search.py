"""Speed and score of the transducer searches and of SpeechBrain's TransducerBeamSearcher, with the same weights.

    python benchmarks/transducer_search.py [--threads N] [--rounds N] [--seconds 5 15] [--steps N]
        [--output benchmarks/results/transducer_search.csv]

No encoder runs. Frames of 40 ms are generated: each of 500 tokens has a vector, one frame in six has the vector of a random
token, the others are silence, and noise is added to all. Predictor and joint network (512 each) train for a minute to recognise
the tokens. The predictor is an LSTM, or the stateless one, which SpeechBrain's searcher does not support. Times are medians of
alternating runs. The score of a text is its log-probability over all alignments, also those with several tokens per frame.
``errors`` are token errors in %.
"""

import argparse
import functools
from pathlib import Path

import torch
from speechbrain.decoders.transducer import TransducerBeamSearcher
from speechbrain.utils.edit_distance import accumulatable_wer_stats

from speechbrain_ext.decoders.transducer import TransducerSearch
from speechbrain_ext.lobes.transducer import PREDICTORS, Transducer
from speechbrain_ext.lobes.transducer_loss import TransducerLoss
from speechbrain_ext.utils.files import write_csv
from speechbrain_ext.utils.machine import describe_machine
from speechbrain_ext.utils.measure import medians

FIELDS = ("search", "predictor", "beam", "seconds", "machine", "ms", "rtfx", "times_speechbrain", "score", "errors")
VOCAB, D_MODEL, SIZE, SPECIAL, BLANK = 500, 144, 512, 4, 0
FRAMES_PER_SECOND, FRAMES_PER_TOKEN, NOISE = 25, 6, 0.7


def make_frames(vectors, utterances, frames):
    """Frames (B, T, D), and their tokens (B, U)."""
    units = torch.zeros(utterances, frames, dtype=torch.long)
    places = torch.rand(utterances, frames).argsort(1)[:, : frames // FRAMES_PER_TOKEN].sort(1).values
    tokens = torch.randint(SPECIAL, VOCAB, places.shape)
    noise = NOISE * torch.randn(utterances, frames, D_MODEL)
    return vectors[units.scatter(1, places, tokens)] + noise, tokens


def train(predictor, vectors, steps):
    """Train a transducer to recognise the tokens in most of their frames."""
    net = Transducer(D_MODEL, VOCAB, predictor, predictor_size=SIZE, joint_size=SIZE)
    loss = TransducerLoss(D_MODEL, SIZE, VOCAB, warmup=0)
    with torch.no_grad():  # the initial weights already separate the vectors; training mostly has to learn the blank
        net.project_frames.weight.mul_(2)
        hidden = net.project_frames(vectors).tanh()
        net.out.weight.copy_(0.05 * (hidden - hidden.mean(0)))
        loss.frame_scores.weight.copy_(0.1 * vectors)
    optimizer = torch.optim.Adam([*net.parameters(), *loss.parameters()], lr=2e-3)
    for _ in range(steps):
        frames, tokens = make_frames(vectors, 8, 48)
        lengths, counts = (torch.full((8,), part.shape[1]) for part in (frames, tokens))
        optimizer.zero_grad()
        loss(net, frames, lengths, tokens, counts, (frames.shape[1], tokens.shape[1])).backward()
        optimizer.step()
    return net.eval()


def searches_of(net, predictor):
    """Functions from encoder frames (1, T, D) to tokens, by name of the search and beam size."""

    def theirs(beam):
        networks = [net.predictor.embedding, net.predictor.lstm, net.project_outputs]
        searcher = TransducerBeamSearcher(networks, net.joint, [net.out], BLANK, beam_size=beam, nbest=1)
        return lambda frames: searcher(net.project_frames(frames))[0][0]

    searches = {
        ("transducer_greedy" if beam == 1 else "transducer_beam", beam): lambda frames, beam=beam: TransducerSearch(net, beam)(
            frames, torch.ones(1)
        )[0][0]
        for beam in (1, 4, 10)
    }
    if predictor == "lstm":
        searches |= {
            ("transducer_greedy, SpeechBrain", 1): theirs(1),
            ("transducer_beam, SpeechBrain", 4): theirs(4),
        }
    return searches


def score(net, frames, tokens):
    """The log-probability of a text."""
    loss = TransducerLoss(D_MODEL, SIZE, VOCAB, "full").eval()
    lengths, counts = torch.tensor([frames.shape[1]]), torch.tensor([len(tokens)])
    return -loss(net, frames, lengths, torch.tensor([tokens], dtype=torch.long).view(1, -1), counts).item()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 15])
    parser.add_argument("--steps", type=int, default=400, help="steps of training")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "transducer_search.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    vectors, rows, theirs = torch.randn(VOCAB, D_MODEL), [], {}
    nets = {}
    with torch.enable_grad():
        for predictor in sorted(PREDICTORS):  # the LSTM first, because only it gives SpeechBrain's times
            nets[predictor] = train(predictor, vectors, arguments.steps)
    for seconds in arguments.seconds:
        frames, tokens = make_frames(vectors, 1, FRAMES_PER_SECOND * seconds)
        for predictor, net in nets.items():
            searches = searches_of(net, predictor)
            calls = {name: functools.partial(search, frames) for name, search in searches.items()}
            ms = medians(calls, arguments.rounds)
            theirs |= {(seconds, beam): time for (name, beam), time in ms.items() if "SpeechBrain" in name}
            for (name, beam), time in ms.items():
                said, base = searches[name, beam](frames), theirs.get((seconds, beam))
                values = {
                    "search": name,
                    "predictor": predictor,
                    "beam": beam,
                    "seconds": seconds,
                    "machine": describe_machine("cpu")["hardware"],
                    "ms": round(time, 1),
                    "rtfx": round(1000 * seconds / time, 1),
                    "times_speechbrain": round(base / time, 1) if base else "",
                    "score": round(score(net, frames, said), 2),
                    "errors": round(accumulatable_wer_stats([tokens[0].tolist()], [said])["WER"], 2),
                }
                print(", ".join(f"{key} {value}" for key, value in values.items()), flush=True)
                rows.append(values.values())
    write_csv(arguments.output, FIELDS, rows)


if __name__ == "__main__":
    main()
