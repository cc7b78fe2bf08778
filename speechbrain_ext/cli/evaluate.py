"""``evaluate``: error rates of a model on test sets."""

import sys
from contextlib import redirect_stdout

from speechbrain_ext.cli._common import (
    add_device,
    add_model,
    add_pass,
    add_search,
    choose_search,
    load,
    say,
    usage,
)
from speechbrain_ext.utils.errors import UsageError


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a model's word error rate",
        description="Transcribe test sets and print word error rates, with 95 % intervals by bootstrap over utterances. The "
        "real-time factor includes features, encoder and search, in batches of up to two minutes of audio.",
    )
    add_model(parser)
    add_pass(parser)
    add_device(parser)
    parser.add_argument(
        "manifests",
        metavar="[NAME=]MANIFEST",
        nargs="+",
        help="a test set: a manifest in any format that training accepts, test-clean.csv of a run, or a LibriSpeech folder",
    )
    add_search(parser, is_repeated=True)
    parser.add_argument("--output", metavar="FILE.csv", help="results table to append to")
    parser.add_argument(
        "--text-normalization",
        metavar="CASE",
        default="none",
        help="case of the transcripts: none, upper or lower, as in training (none)",
    )
    parser.add_argument("--words-only", action="store_true", help="leave out punctuation and symbols of the transcripts")
    parser.add_argument(
        "--data-folder", metavar="FOLDER", help="the folder that replaces a placeholder at the start of audio paths"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; by default PyTorch's choice")
    parser.set_defaults(run=run)


def run(arguments):
    """Print error rates; the exit status is 1 if utterances were left out."""
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads is {arguments.threads}; give 1 or more.")
    with redirect_stdout(sys.stderr):
        import torch

        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
    model = load(arguments)
    with usage():
        from speechbrain_ext.decoders import BEAM
        from speechbrain_ext.decoders.token_ngram import is_arpa, is_of_tokens
        from speechbrain_ext.decoders.word_lm import arpa_words, share_unknown
        from speechbrain_ext.inference.evaluate import evaluate, make_searches
        from speechbrain_ext.training.results import append_rows, check_table
        from speechbrain_ext.utils.error_rates import error_sentence

        words = None
        used = arguments.lm is not None and arguments.lm_weight != 0
        if used and is_arpa(arguments.lm) and not is_of_tokens(arguments.lm):
            words = arpa_words(arguments.lm)
        with model.choosing():
            model.choose_beam(arguments.beam_size)  # a transducer's own search depends on it
            compared = [] if words is None else [model.own_search, BEAM]
            choose_search(model, arguments, *(arguments.search or compared))
        searches = make_searches(model)
        if arguments.output is not None:
            check_table(arguments.output)
        sets = _read(arguments, model)
    skipped = 0
    for name, (rows, left_out) in sets.items():
        with redirect_stdout(sys.stderr):
            error_rates, seconds = evaluate(model, rows, searches, progress=True)
            unknown = None if words is None else share_unknown(words, [row.wrd for row in rows])
            given = arguments, model, unknown, name, rows
            results = [_row(*given, search, error_rates[search], seconds[search]) for search in searches]
        for row in results:
            with_lm = f", {row['lm_unknown']} % of the words unknown to {row['lm']}" if "lm_unknown" in row else ""
            print(f"{name} {row['search']}: {error_sentence(row)}, real-time factor {row['real_time_factor']:g}{with_lm}")
            if row.get("phrases_said"):
                said = f"{row['phrases_said']} occurrences of phrases of {row['phrases']}"
                print(f"{name} {row['search']}: {row['phrase_recall']} % of the {said} are found")
            elif arguments.phrases is not None:
                print(f"{name} {row['search']}: none of the phrases is said in {name}")
        if arguments.output is not None:
            append_rows(arguments.output, results)
        for skip in left_out:
            say(f"{name}: {skip.ID or skip.file} is left out: {skip.reason}{f' ({skip.detail})' if skip.detail else ''}.")
        skipped += len(left_out)
    return int(skipped > 0)


def _read(arguments, model):
    """The utterances of each test set, and those that cannot be used."""
    from speechbrain_ext.dataio.manifests import named_manifests, read_entries, select
    from speechbrain_ext.dataio.preparation import check_utterances
    from speechbrain_ext.dataio.tokenizer import most_frequent, remedy_for, unknown_characters

    sets = {}
    for name, path in named_manifests(arguments.manifests).items():
        entries, _ = read_entries(path, arguments.data_folder)
        utterances, flawed = select(name, entries, arguments.text_normalization, arguments.words_only)
        rows, skipped = check_utterances(name, utterances)
        if not rows:
            first = (flawed + skipped)[0]
            raise UsageError(f"{path} has no utterance that can be used ({first.reason}: {first.detail or first.file}); fix it.")
        unknown = unknown_characters(model.tokenizer, [row.wrd for row in rows])
        if unknown:
            most = max(unknown.values())
            fault = f"transcripts of {path} have characters that the model does not write ({most_frequent(unknown)})"
            remedy = remedy_for(unknown, model.tokenizer, "--text-normalization", "--words-only")
            if 2 * most > len(rows):
                raise UsageError(f"Most {fault}; {remedy}.")
            say(f"{most} or more {fault}, which count as errors; {remedy}.")
        sets[name] = rows, flawed + skipped
    return sets


def _row(arguments, model, unknown, test_set, rows, search, error_rate, seconds):
    """A row of the results table, without the columns of training, and with the columns of the search."""
    from speechbrain_ext.decoders import GREEDY_SEARCHES, search_name
    from speechbrain_ext.registry import encoder_name, passes_of
    from speechbrain_ext.training.results import FIELDS
    from speechbrain_ext.utils.error_rates import error_figures
    from speechbrain_ext.utils.machine import describe_machine, peak_memory_mib

    encoder, audio = model.mods.encoder.transformer.encoder, sum(row.duration for row in rows)
    passes, (lm, settings) = passes_of(encoder), model.lm_of(search)
    known = {
        "architecture": encoder_name(encoder),
        "test_set": test_set,
        "search": search_name((model.pass_name or passes[-1]) if len(passes) > 1 else None, search, lm is not None),
        **error_figures(error_rate),
        "parameters": sum(parameter.numel() for parameter in model.hparams.asr_model.parameters()),
        "peak_memory_mib": round(peak_memory_mib(str(model.device))),
        "precision": "fp32",
        **describe_machine(str(model.device)),
    }
    return {field: known.get(field, "") for field in FIELDS} | {
        "model": arguments.model,
        "utterances": len(rows),
        "audio_hours": round(audio / 3600, 3),
        "real_time_factor": round(seconds / audio, 4),
        **({} if lm is None else {"lm": lm, **settings}),
        **({} if unknown is None or lm is None else {"lm_unknown": round(100 * unknown, 2)}),
        **({} if search in GREEDY_SEARCHES else {"beam_size": model.beam_of(search)}),
        **(_phrase_columns(arguments, model.phrases, search, error_rate.scores) if arguments.phrases else {}),
    }


def _phrase_columns(arguments, phrases, search, scores):
    """The share of phrases that were found, in %, and how they were given."""
    from speechbrain_ext.decoders import GREEDY_SEARCHES
    from speechbrain_ext.decoders.phrases import BONUS, count_phrases

    bonus = BONUS if arguments.phrase_bonus is None else arguments.phrase_bonus
    said, found = count_phrases(phrases, *([score[key] for score in scores] for key in ("ref_tokens", "hyp_tokens")))
    return {
        "phrases": arguments.phrases,
        **({} if search in GREEDY_SEARCHES else {"phrase_bonus": bonus}),
        "phrases_said": said,
        "phrase_recall": round(100 * found / said, 2) if said else "",
    }
