"""Load language models of SpeechBrain for the joint search, from a folder of weights, sizes and tokenizer.

A folder has ``hyperparams.yaml``, ``lm.ckpt`` and ``tokenizer.ckpt``, as in SpeechBrain's Hugging Face repositories. Only the
language model is built; its settings are read as plain values, and its weights as tensors.
"""

import json
import os
import re
from pathlib import Path

import ruamel.yaml
import torch
from ruamel.yaml.nodes import MappingNode, ScalarNode
from sentencepiece import SentencePieceProcessor
from speechbrain.lobes.models.RNNLM import RNNLM

from speechbrain_ext.dataio.tokenizer import piece_ids
from speechbrain_ext.model_folder import HYPERPARAMS, TOKENIZER
from speechbrain_ext.model_folder.build import LARGEST_TEXT, build
from speechbrain_ext.model_folder.fetch import download, split_revision
from speechbrain_ext.model_folder.weights import load_tokenizer
from speechbrain_ext.utils.errors import UserError, UserRuntimeError, one_line
from speechbrain_ext.utils.files import read_bytes

LM_WEIGHTS = "lm.ckpt"
CLASSES = (
    "!new:speechbrain.lobes.models.transformer.TransformerLM.TransformerLM",
    "!new:speechbrain.lobes.models.RNNLM.RNNLM",
)
NEVER = -1e4
"""The logit of tokens that the language model lacks."""
MISSING = "There is no language model {}; give an ARPA file, a folder, or user/model of Hugging Face."
_REFERENCE = re.compile(r"<(\w+)>")


def load_lm(source, tokenizer):
    """Load a language model for a model with the same tokens; their ids may differ.

    Arguments
    ---------
    source : str or os.PathLike
        A folder, or a Hugging Face repository, ``user/model`` or ``user/model@revision`` (a commit, tag or branch).
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer of the model.

    Returns
    -------
    torch.nn.Module
        SpeechBrain's TransformerLM or RNNLM, in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If the folder or repository is missing, or lacks a file.
    UserError
        If it holds no such language model, is damaged, or has other tokens.

    Example
    -------
    >>> load_lm("/no/such/folder", SentencePieceProcessor())
    Traceback (most recent call last):
    FileNotFoundError: There is no language model /no/such/folder; give an ARPA file, a folder, or user/model of Hugging Face.
    """
    source = os.fspath(source)
    folder = Path(source)
    if not (source and folder.is_dir()):
        folder = download(*split_revision(source), (HYPERPARAMS, LM_WEIGHTS, TOKENIZER), MISSING)
    for name in (HYPERPARAMS, LM_WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{source} has no {name}, so it is no language model for the joint search; give a folder or repository of "
                f"SpeechBrain with {HYPERPARAMS}, {LM_WEIGHTS} and {TOKENIZER}."
            )
    try:
        theirs = SentencePieceProcessor()
        load_tokenizer(theirs, folder / TOKENIZER)
        weights = _read_weights(folder / LM_WEIGHTS)
        text, special = _settings(read_bytes(folder / HYPERPARAMS, LARGEST_TEXT).decode("utf-8-sig"), theirs)
        model = build(text, ((folder / LM_WEIGHTS).stat().st_size, len(weights)))["lm"]
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            flaw = " ".join(str(error).splitlines()[1:2]) or str(error)
            raise UserError(f"{LM_WEIGHTS} does not match {HYPERPARAMS} ({one_line(flaw, 150)})") from error
        if not all(value.isfinite().all() for value in weights.values()):
            raise UserError(f"{LM_WEIGHTS} holds NaN or infinite values")
        embedding, output = _tables(model)
        if not theirs.vocab_size() == embedding.num_embeddings == output.out_features:
            raise UserError(f"it has {theirs.vocab_size()} tokens and {output.out_features} outputs")
    except (UserError, UnicodeDecodeError) as error:
        raise UserRuntimeError(
            f"The language model {source} cannot be used: {one_line(error).rstrip('.')}; copy it again."
        ) from error
    _take_rows(embedding, output, torch.tensor(_rows(source, theirs, tokenizer, special)))
    return model.eval()


def _tables(model):
    """The embedding and the output layer of a language model."""
    if isinstance(model, RNNLM):
        return model.embedding.Embedding, model.out.w
    return model.custom_src_module.emb.Embedding, model.output_proj.layers[-1].w


@torch.no_grad()
def _take_rows(embedding, output, rows):
    """Renumber tokens: the new tokens have these rows (V,); tokens without a row (-1) are never predicted."""
    embedding.weight = torch.nn.Parameter(embedding.weight[rows.clamp(min=0)])
    output.weight = torch.nn.Parameter(output.weight[rows.clamp(min=0)].masked_fill((rows < 0).unsqueeze(1), 0.0))
    output.bias = torch.nn.Parameter(output.bias[rows.clamp(min=0)].masked_fill(rows < 0, NEVER))
    embedding.num_embeddings = output.out_features = len(rows)


def _read_weights(path):
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can raise any error, also for refused classes
        raise UserRuntimeError(f"{path.name} is damaged, or holds more than tensors, which could run code") from error
    tensors = isinstance(weights, dict) and all(isinstance(value, torch.Tensor) for value in weights.values())
    if not tensors or not all(isinstance(name, str) for name in weights):
        raise UserRuntimeError(f"{path.name} holds no tensors by name")
    return weights


def _settings(text, tokenizer):
    """The language model's settings as text of a model folder, with the key "lm"; and its special tokens by role."""
    try:
        root = ruamel.yaml.SafeLoader(text).get_single_node()
    except (ruamel.yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{HYPERPARAMS} is not valid YAML ({one_line(error, 100)})") from error
    if not isinstance(root, MappingNode):
        raise UserError(f"{HYPERPARAMS} holds no keys")
    keys = {key.value: value for key, value in root.value if isinstance(key, ScalarNode)}
    # A top-level key, as in the published files
    found = [node for node in keys.values() if isinstance(node, MappingNode) and str(node.tag) in CLASSES]
    if len(found) != 1:
        raise UserError(f"{HYPERPARAMS} has {len(found)} keys with a TransformerLM or RNNLM instead of one")
    settings = {key.value: _plain(value, keys) for key, value in found[0].value}
    if str(found[0].tag) == CLASSES[1]:
        settings["return_hidden"] = "True"  # needed by a search, without other effects
    special = {"bos": tokenizer.bos_id(), "eos": tokenizer.eos_id(), "unk": tokenizer.unk_id()}
    for role in ("bos", "eos"):  # SpeechBrain's tokenizers do not always have them
        stated = _plain(keys[f"{role}_index"], keys) if f"{role}_index" in keys else ""
        special[role] = int(stated) if stated.isdigit() else special[role]
    lines = [f"  {json.dumps(key)}: {value}" for key, value in settings.items()]
    return "\n".join([f"lm: {found[0].tag}", *lines]), special


def _plain(node, keys, depth=0):
    """A number, text or name as YAML, with resolved references."""
    if isinstance(node, ScalarNode):
        tag, value = str(node.tag), node.value
        reference = _REFERENCE.fullmatch(value) if tag == "!ref" else None
        if reference and reference[1] in keys and depth < 10:
            return _plain(keys[reference[1]], keys, depth + 1)
        if tag.startswith("!name:") and not value:
            return tag
        if tag == "tag:yaml.org,2002:str":
            return json.dumps(value)
        if tag.startswith("tag:yaml.org,2002:"):
            return value or "null"
    raise UserError(f"{HYPERPARAMS} has a setting of the language model that is not a number, text or name")


def _rows(source, theirs, ours, special):
    """For each token of the model, the token of the language model. Different tokens are refused: they would give wrong words."""
    remedy = "give one that was trained with the model's tokenizer, or train the model with the language model's tokenizer"
    rows, wanted = piece_ids(theirs), piece_ids(ours)
    if missing := [*(wanted.keys() - rows.keys()), *(rows.keys() - wanted.keys())]:
        raise UserError(
            f"The language model {source} has other tokens than the model: {len(missing)} are in only one of them, such as "
            f"{one_line(min(missing), 40)!r}; {remedy}."
        )
    places = [rows.get(ours.id_to_piece(token), -1) for token in range(ours.vocab_size())]
    if theirs.pad_id() >= 0 and ours.pad_id() >= 0:  # in no text, but in the sum over all tokens
        places[ours.pad_id()] = theirs.pad_id()
    for role, token in special.items():
        place = getattr(ours, f"{role}_id")()
        if not (0 <= place < len(places) and 0 <= token < theirs.vocab_size()):
            raise UserError(f"The language model {source} and the model do not both have a token {role}; {remedy}.")
        places[place] = token
    return places
