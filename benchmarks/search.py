"""Speed of the searches: greedy CTC, CTC beam in Python (SpeechBrain's) and in C++ (flashlight's), and the joint CTC/attention
search with SpeechBrain's classes and with ours.

    python benchmarks/search.py [--threads N] [--rounds N] [--seconds 5 15 30] [--output benchmarks/results/search.csv]

Heads and decoder have the sizes of ``hparams/hyperconformer.yaml`` (d_model 144, 4 decoder layers, about 5000 tokens) and random
weights. The searches have the settings of the recipe with a beam of 10. No encoder runs: its frames are generated for a CTC head
that predicts four tokens per second, with blanks between them and some uncertainty. A random decoder rarely ends a text, so the
joint searches stop at 4.8 tokens per second. Times are medians of alternating runs; RTFx is seconds of audio per second of
search. Both joint searches must give the same tokens, and scores that differ by at most 1e-4.
"""

import argparse
import io
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from speechbrain.decoders import S2STransformerBeamSearcher
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.decoders.scorer import CTCScorer, ScorerBuilder
from speechbrain.nnet.linear import Linear

from speechbrain_ext.asr import TransformerASR
from speechbrain_ext.decoders import ctc_prefix, searchers
from speechbrain_ext.decoders.ctc_beam import FLASHLIGHT, SPEECHBRAIN, CtcBeamSearch
from speechbrain_ext.utils.files import write_csv
from speechbrain_ext.utils.measure import medians

FIELDS = ("search", "beam", "seconds", "threads", "tokens", "ms", "rtfx", "times_speechbrain")
FRAMES_PER_SECOND, TOKENS_PER_SECOND, BEAM = 25, 4, 10
BLANK, BOS, EOS, SPECIAL = 0, 1, 2, 4


def make_tokenizer(vocab=5000):
    """A tokenizer of random words; searches use only the number of its pieces and the word boundaries."""
    letters = torch.randint(26, (20000, 8)) + ord("A")
    sentences = (" ".join("".join(map(chr, word)) for word in words) for words in letters.view(-1, 10, 8).tolist())
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab,
        hard_vocab_limit=False,
        pad_id=BLANK,
        bos_id=BOS,
        eos_id=EOS,
        unk_id=3,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def make_frames(ctc_lin, seconds):
    """Encoder frames (1, T, D) with the highest CTC logits at about four random tokens per second, and at the blank elsewhere."""
    frames = FRAMES_PER_SECOND * seconds
    heard = torch.full((frames,), BLANK)
    at = torch.randperm(frames)[: TOKENS_PER_SECOND * seconds]
    heard[at] = torch.randint(SPECIAL, len(ctc_lin.w.weight), (len(at),))
    rows = ctc_lin.w.weight[heard]
    # Its logit is 20 above the others on average, so that the search follows CTC and not the random decoder
    return (20 * rows / rows.square().sum(-1, keepdim=True) + 0.5 * torch.randn_like(rows)).unsqueeze(0)


def joint_search(net, seq_lin, ctc_lin, searcher, ctc_scorer):
    """The search of the recipe."""
    return searcher(
        modules=[net, seq_lin],
        bos_index=BOS,
        eos_index=EOS,
        min_decode_ratio=0.0,
        max_decode_ratio=1.2 * TOKENS_PER_SECOND / FRAMES_PER_SECOND,
        beam_size=BEAM,
        temperature=1.15,
        using_eos_threshold=False,
        length_normalization=True,
        scorer=ScorerBuilder({"ctc": 0.4}, partial_scorers=[ctc_scorer(ctc_lin, BLANK, EOS)]),
    )


def compare(seconds, rounds, tokenizer, parts):
    """Rows of the table for one length."""
    net, seq_lin, ctc_lin = parts
    enc, whole = make_frames(ctc_lin, seconds), torch.ones(1)
    theirs = joint_search(*parts, S2STransformerBeamSearcher, CTCScorer)
    ours = joint_search(*parts, searchers.S2STransformerBeamSearcher, ctc_prefix.CTCScorer)
    beams = {name: CtcBeamSearch(tokenizer, BLANK, BEAM, backend=name) for name in (FLASHLIGHT, SPEECHBRAIN)}
    expected, answer = theirs(enc, whole), ours(enc, whole)
    if expected[0] != answer[0] or (expected[2] - answer[2]).abs().max() > 1e-4:
        raise RuntimeError(f"The joint searches differ on {seconds} s: {expected[0]} and {answer[0]}.")
    ms = medians(
        {
            "ctc_greedy": lambda: ctc_greedy_decode(ctc_lin(enc).log_softmax(-1), whole, BLANK),
            "ctc_beam, SpeechBrain": lambda: beams[SPEECHBRAIN](ctc_lin(enc).log_softmax(-1), whole),
            "ctc_beam": lambda: beams[FLASHLIGHT](ctc_lin(enc).log_softmax(-1), whole),
            "joint_beam, SpeechBrain": lambda: theirs(enc, whole),
            "joint_beam": lambda: ours(enc, whole),
        },
        rounds,
    )
    for name, time in ms.items():
        base = ms.get(f"{name.split(',')[0]}, SpeechBrain")
        yield {
            "search": name,
            "beam": 1 if name == "ctc_greedy" else BEAM,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "tokens": len(answer[0][0]) if name.startswith("joint") else "",
            "ms": round(time, 1),
            "rtfx": round(1000 * seconds / time, 1),
            "times_speechbrain": round(base / time, 1) if base else "",
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 15, 30])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "search.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vocab = tokenizer.vocab_size()
    net = TransformerASR(
        vocab, 640, 144, 8, num_encoder_layers=1, num_decoder_layers=4, d_ffn=576, activation=torch.nn.GELU, normalize_before=True
    )
    seq_lin, ctc_lin = (Linear(input_size=144, n_neurons=vocab) for _ in range(2))
    rows = []
    print(("{:>26}" + "{:>18}" * (len(FIELDS) - 1)).format(*FIELDS))
    with torch.no_grad():
        for seconds in arguments.seconds:
            for values in compare(seconds, arguments.rounds, tokenizer, (net.eval(), seq_lin, ctc_lin)):
                print(("{:>26}" + "{:>18}" * (len(FIELDS) - 1)).format(*map(str, values.values())), flush=True)
                rows.append(values)
    write_csv(arguments.output, FIELDS, [values.values() for values in rows])


if __name__ == "__main__":
    main()
