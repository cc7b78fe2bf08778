"""Initialise a model with trained weights.

Weights are loaded if name and shape match. Outputs and embeddings have a row for each token: if the tokenizers differ, rows of
equal pieces are copied. A table shows what was loaded, what was not, and why.
"""

from collections import Counter
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from speechbrain.utils.logger import get_logger

from speechbrain_ext.dataio.tokenizer import arrange_tokenizer, piece_ids
from speechbrain_ext.model_folder.write import model_parts
from speechbrain_ext.training.sources import checked_tokenizer
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.prefixes import begins_with, check_prefixes
from speechbrain_ext.utils.text import listing, table

logger = get_logger(__name__)

OF_TOKENS = ("ctc_lin", "seq_lin", "transformer.custom_tgt_module", "transducer.predictor.embedding", "transducer.out")
"""Prefixes of weights that have a row for each token."""
LOADED, EXCLUDED, ABSENT, UNUSED = "loaded", "excluded", "not in the source", "not in this model"
UNKNOWN = "not loaded: the tokens of the rows are unknown"
ROLES = ("blank", "bos", "eos", "unk")
"""Special tokens; the keys of their ids end in _index."""
NOISE = 0.1
"""Standard deviation of new rows around the mean row, as a share of that of the existing rows; it makes new rows differ."""


def warm_start(model, source, tokenizer, special, include=(), exclude=(), same_tokens=False, seed=0):
    """Load the weights of another model.

    Arguments
    ---------
    model : torch.nn.Module
        A model with the parts and names of a model folder (:func:`speechbrain_ext.model_folder.write.model_parts`); changed in
        place.
    source : Source
        The weights.
    tokenizer : bytes
        The SentencePiece model of the run.
    special : dict
        Ids of the tokens ``blank``, ``bos``, ``eos`` and ``unk`` of the run.
    include, exclude : sequence of str
        Prefixes of the names to load (all by default), and prefixes of names to leave out.
    same_tokens : bool
        Whether a source without a tokenizer has the tokens of the run.
    seed : int
        Seed for the rows of new tokens.

    Returns
    -------
    str
        The table.

    Raises
    ------
    UserError
        If a prefix matches nothing, a weight is not finite or has another shape for a reason other than the tokenizer, or
        nothing would be loaded.

    Example
    -------
    >>> from speechbrain_ext.training.sources import Source
    >>> old, new = (torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)}) for _ in range(2))
    >>> print(warm_start(new, Source("old", "", old.state_dict(), ""), b"", {}, exclude=["b"]))
    | part | weights | numbers | |
    | --- | --- | --- | --- |
    | a | 2 | 6 | loaded |
    | b | 2 | 6 | excluded |
    >>> torch.equal(old["a"].weight, new["a"].weight), torch.equal(old["b"].weight, new["b"].weight)
    (True, False)
    """
    if "SpeechBrain" in source.kind and any(getattr(part, "speechbrain_scores", True) is False for part in model.modules()):
        raise UserError(
            f"{source.name} is a model of SpeechBrain, whose attention scales its scores differently; also give "
            "--encoder_kwargs '{speechbrain_scores: True}'."
        )
    if "NeMo" in source.kind:
        logger.warning(
            "The features of %s are NeMo's and differ from those of this model: its first steps adapt to them.", source.name
        )
    state = model.state_dict()
    check_prefixes("init_include", include, state)
    check_prefixes("init_exclude", exclude, state)
    places = None if source.tokenizer is None and same_tokens else _places(source, tokenizer, special)
    generator = torch.Generator().manual_seed(seed)
    outcomes, misfits = {}, []
    for name, value in state.items():
        given = source.weights.get(name)
        taken = not include or any(begins_with(name, prefix) for prefix in include)
        if not taken or any(begins_with(name, prefix) for prefix in exclude):
            outcomes[name] = EXCLUDED
        elif given is None or _is_unlearned(name, given):
            outcomes[name] = ABSENT
        elif places is not None and any(begins_with(name, prefix) for prefix in OF_TOKENS):
            if source.tokenizer is None:
                outcomes[name] = UNKNOWN
            elif given.shape[1:] != value.shape[1:] or int(places.max()) >= len(given):
                outcomes[name] = _misfit(given, value)
                misfits.append(name)
            else:
                outcomes[name] = f"loaded {int((places >= 0).sum())} of {len(places)} rows, of equal pieces"
                state[name] = _copy_rows(given.to(value.dtype), places, generator)
        elif given.shape != value.shape and not _is_unlearned(name, value):
            outcomes[name] = _misfit(given, value)
            misfits.append(name)
        else:
            outcomes[name], state[name] = LOADED, given.to(value.dtype)
    unused = {name: value for name, value in source.weights.items() if name not in outcomes}
    text = _table(outcomes | dict.fromkeys(unused, UNUSED), state | unused)
    logger.info("Initial weights of %s, %s:\n%s", source.name, source.kind, text)
    if misfits:
        shapes = outcomes[misfits[0]].removeprefix("not loaded: ")
        raise UserError(
            f"{source.name} has {len(misfits)} weights of another shape, such as {misfits[0]} ({shapes}); give the "
            "sizes of that model, or leave these weights out with init_exclude."
        )
    if not any(outcome.startswith(LOADED) for outcome in outcomes.values()):
        theirs, ours = (listing(dict.fromkeys(map(_part, weights)), 5) for weights in (source.weights, state))
        raise UserError(
            f"Nothing of {source.name} would be loaded: it has {theirs}, and this model has {ours}; check init_include and "
            "init_exclude."
        )
    if broken := [name for name in outcomes if outcomes[name].startswith(LOADED) and not torch.isfinite(state[name]).all()]:
        raise UserError(
            f"{source.name} has {len(broken)} weights with NaN or infinite values, such as {broken[0]}; give another model."
        )
    model.load_state_dict(state)
    return text


def chosen_tokenizer(hparams, source):
    """The tokenizer of a run.

    Arguments
    ---------
    hparams : dict
        The hparams of the run; ``tokenizer_from`` is ``init``, ``new`` or a file.
    source : Source, optional
        The initial model.

    Returns
    -------
    bytes or None
        A SentencePiece model with the special tokens at the ids of the hparams; None if the run trains a tokenizer.

    Raises
    ------
    UserError
        If the tokenizer is missing or damaged.
    """
    chosen = hparams["tokenizer_from"]
    if chosen == "new" or chosen == "init" and source is None:
        return None
    if chosen == "init":
        if source.tokenizer is None:
            raise UserError(
                f"{source.name} has no tokenizer; give the one that it was trained with, --tokenizer_from FILE, or train a new "
                "one, --tokenizer_from new."
            )
        model = source.tokenizer
    elif not Path(chosen).is_file():
        raise UserError(f"There is no tokenizer {chosen}; give the file of a SentencePiece model, init or new.")
    else:
        model = checked_tokenizer(Path(chosen).read_bytes(), chosen)
    return arrange_tokenizer(model, *(hparams[f"{role}_index"] for role in ROLES))


def begin_with(source, hparams, tokenizer_file):
    """Load the initial weights of a run.

    Arguments
    ---------
    source : Source
        The weights.
    hparams : dict
        The hparams of the run; their ``model`` and ``transducer_cost`` are changed in place.
    tokenizer_file : str or os.PathLike
        The SentencePiece model of the run.

    Raises
    ------
    UserError
        As :func:`warm_start`, or if no statistics of features are loaded and none will be computed.
    """
    parts, chosen = model_parts(hparams), hparams["tokenizer_from"]
    warm_start(
        parts,
        source,
        Path(tokenizer_file).read_bytes(),
        {role: hparams[f"{role}_index"] for role in ROLES},
        hparams["init_include"],
        hparams["init_exclude"],
        chosen not in ("init", "new"),
        hparams["seed"],
    )
    loss = hparams["transducer_cost"]
    if loss is not None:
        loss.start_from(hparams["ctc_lin"])  # its own weights are in no model folder
        is_new = not any(name.startswith("transducer.") for name in source.weights)
        if is_new and loss.is_pruned and loss.warmup is None:
            logger.warning("%s has no transducer: a new one needs a warm-up; give --transducer_warmup 300.", source.name)
    normalize = hparams["normalize"]
    is_global = getattr(normalize, "norm_type", None) == "global"  # a class of the user may have no such statistics
    learned = normalize.glob_mean.numel() if is_global else 0
    wanted = hparams["compute_features"](torch.zeros(1, hparams["sample_rate"])).shape[-1]
    if learned and learned != wanted:
        raise UserError(
            f"{source.name} has statistics of {learned} features, but this model has {wanted}; give the features of that model, "
            "or leave the statistics out, --init_exclude '[normalize]'."
        )
    if is_global and not learned and normalize.update_until_epoch <= 1:
        raise UserError(
            f"{source.name} has no statistics of features, and update_until_epoch is too small to compute them; raise it: "
            "--normalize '{update_until_epoch: 4}'."
        )


def _places(source, tokenizer, special):
    """For each token of the run, the row of the source (-1: none); None if the tokens are the same."""
    if source.tokenizer is None:
        return torch.empty(0, dtype=torch.long)
    old, new = (SentencePieceProcessor(model_proto=model) for model in (source.tokenizer, tokenizer))
    rows = piece_ids(old)
    roles = {"bos": old.bos_id(), "eos": old.eos_id(), "unk": old.unk_id()}
    # If blank and unknown token share a row, it was trained as the blank
    roles = {role: row for role, row in roles.items() if row != source.blank} | {"blank": source.blank}
    places = [rows.get(new.id_to_piece(token), -1) for token in range(new.vocab_size())]
    for role, token in special.items():
        places[token] = roles.get(role, -1)
    same = places == list(range(old.vocab_size()))
    return None if same else torch.tensor(places)


def _copy_rows(given, places, generator):
    """The rows of (V', ...) at these places (V,); for place -1, the mean row with some noise."""
    mean, deviation = given.mean(0), given.std(0)
    rows = mean + NOISE * deviation * torch.randn((len(places), *mean.shape), generator=generator).to(given.dtype)
    known = places >= 0
    rows[known] = given[places[known]]
    return rows


def _is_unlearned(name, value):
    """Whether a weight is a statistic of features that is not computed yet; such a statistic is empty."""
    return name in ("normalize.glob_mean", "normalize.glob_std") and not value.numel()


def _table(outcomes, weights):
    """Outcomes by part of the model, with the number of weights and of their elements."""
    counts, numbers = Counter(), Counter()
    for name, outcome in outcomes.items():
        row = _part(name), outcome
        counts[row] += 1
        numbers[row] += weights[name].numel()
    return table(
        ["part", "weights", "numbers", ""],
        [[part, count, f"{numbers[part, what]:,}", what] for (part, what), count in counts.items()],
    )


def _part(name):
    """The part of a model that a weight belongs to, for the table."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "transformer" else 1])


def _misfit(given, value):
    return f"not loaded: {_shape(given)}, here {_shape(value)}"


def _shape(value):
    return " x ".join(map(str, value.shape)) or "a number"
