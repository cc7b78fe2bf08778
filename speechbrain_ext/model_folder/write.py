"""Write a model folder at the end of training."""

import json
import re
import shutil
from io import StringIO

import ruamel.yaml
import torch
from hyperpyyaml.core import recursive_resolve
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from speechbrain_ext.hparams import needed_keys, tag_of
from speechbrain_ext.lobes.features import keeps_statistics
from speechbrain_ext.model_folder import CARD, CONFIG, FORMAT_VERSION, HYPERPARAMS, TOKENIZER, WEIGHTS
from speechbrain_ext.model_folder.card import model_card
from speechbrain_ext.model_folder.weights import save_weights
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.files import replacing_folder

# References are to keys of the training hparams
_PARTS = """
speech_encoder: !new:speechbrain_ext.speech_encoder.SpeechEncoder
    compute_features: !ref <compute_features>
    normalize: !ref <normalize>
    subsampling: !ref <subsampling>
    transformer: !ref <Transformer>
    chunk_size: !ref <streaming_chunk_size>
    left_context: !ref <streaming_left_context>
asr_model: !new:torch.nn.ModuleDict
    modules:
        normalize: !ref <normalize>
        subsampling: !ref <subsampling>
        transformer: !ref <Transformer>
        ctc_lin: !ref <ctc_lin>
pretrainer: !new:speechbrain_ext.model_folder.weights.SafetensorsPretrainer
    asr: !ref <asr_model>
    tokenizer: !ref <tokenizer>
modules:
    encoder: !ref <speech_encoder>
blank_index: !ref <blank_index>
sample_rate: !ref <sample_rate>
audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
    sample_rate: !ref <sample_rate>
"""
_CTC_ONLY = """
speech_encoder:
    head: !ref <ctc_lin>
decoding_function: !name:speechbrain.decoders.ctc.ctc_greedy_decode
    blank_id: !ref <blank_index>
"""
_DECODER = """
asr_model:
    modules:
        seq_lin: !ref <seq_lin>
"""
_JOINT_SEARCH = """
modules:
    decoder: !ref <test_search>
"""
_WITH_TRANSDUCER = """
asr_model:
    modules:
        transducer: !ref <transducer>
modules:
    decoder: !ref <transducer_search>
"""


def write_model_folder(folder, hparams_text, hparams, model, tokenizer_file, rows=(), fused=False, provenance=None):
    """Write a trained model as a folder, completely or not at all.

    Arguments
    ---------
    folder : str or os.PathLike
        The folder; an existing one is replaced.
    hparams_text : str
        The merged hparams of the training run, see :func:`speechbrain_ext.hparams.merge_hparams`.
    hparams : dict
        The same hparams with built objects.
    model : torch.nn.Module
        The weights: a module with the parts ``normalize``, ``subsampling``, ``transformer``, ``ctc_lin`` and, with a decoder,
        ``seq_lin`` or, with a transducer, ``transducer``.
    tokenizer_file : str
        The SentencePiece model.
    rows : list of dict
        Results for the model card.
    fused : bool
        Whether the weights are fused by ``fuse_()``; subsampling and encoder are then built with their key ``fused``.
    provenance : dict, optional
        The origin of architecture, data, tokenizer and weights, as texts and lists of texts by name.

    Raises
    ------
    UserError
        If the statistics of the normalisation would be lost.
    """
    check_normalization(hparams["normalize"])
    tree = ruamel.yaml.YAML().load(hparams_text)
    with replacing_folder(folder) as partial:
        (partial / HYPERPARAMS).write_text(inference_hparams(tree, hparams, fused, provenance), encoding="utf-8")
        save_weights(model, partial / WEIGHTS, hparams["weights_precision"])
        shutil.copyfile(tokenizer_file, partial / TOKENIZER)
        config = {
            "format_version": FORMAT_VERSION,
            "library_name": "speechbrain_ext",
            "speechbrain_interface": interface(tree),
        }
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / CARD).write_text(model_card(tree, interface(tree), rows, provenance), encoding="utf-8")


def check_normalization(normalize):
    """Refuse a normalisation whose statistics a model folder cannot hold."""
    if keeps_statistics(normalize):
        raise UserError(
            f"normalize is {type(normalize).__module__}.{type(normalize).__qualname__} with norm_type global, whose statistics "
            "a model folder cannot hold; use speechbrain_ext.lobes.features.InputNormalization."
        )


def interface(tree):
    """The class of SpeechBrain that loads the model of parsed training hparams."""
    return "EncoderASR" if _CTC_ONLY in _head(tree) else "EncoderDecoderASR"


def _head(tree):
    """The part of the folder's hparams for the head of the model."""
    if tree["num_decoder_layers"]:
        return _DECODER + (_CTC_ONLY if tree["test_search"] is None else _JOINT_SEARCH)
    return _CTC_ONLY if tree.get("transducer") is None else _WITH_TRANSDUCER


def model_parts(hparams):
    """The weights of a model with the names of a model folder.

    Arguments
    ---------
    hparams : dict
        Built training hparams.

    Returns
    -------
    torch.nn.ModuleDict
    """
    names = {"normalize": "normalize", "subsampling": "subsampling", "transformer": "Transformer", "ctc_lin": "ctc_lin"}
    if hparams["num_decoder_layers"]:
        names["seq_lin"] = "seq_lin"
    if hparams["transducer"] is not None:
        names["transducer"] = "transducer"
    return torch.nn.ModuleDict({name: hparams[key] for name, key in names.items()})


def inference_hparams(tree, hparams, fused=False, provenance=None):
    """The part of the training hparams that inference needs, in the grammar of model folders, with the classes for loading.

    Arguments
    ---------
    tree : dict
        Parsed training hparams, with unresolved references.
    hparams : dict
        The same hparams with built objects.
    fused : bool
        Whether subsampling and encoder are fused.
    provenance : dict, optional
        As in :func:`write_model_folder`.

    Returns
    -------
    str
    """
    own = ruamel.yaml.YAML().load(_PARTS)
    for key, value in ruamel.yaml.YAML().load(_head(tree)).items():
        _merge(own, key, value)
    picked = CommentedMap()
    plain = _Plain(tree | {key: value for key, value in own.items() if _is_object(value)}, hparams)
    needed = needed_keys(tree, own) - own.keys()
    for key, value in tree.items():
        if key in needed and _is_object(value):  # plain values replace references to them
            picked[key] = plain(value)
    if fused:
        picked["subsampling"]["fused"] = True
        keys = picked["Transformer"].get("encoder_kwargs") or CommentedMap()
        keys["fused"] = True
        picked["Transformer"]["encoder_kwargs"] = keys
    for key, value in own.items():
        picked[key] = plain(value)
    if provenance:
        picked["provenance"] = provenance
    text = StringIO()
    ruamel.yaml.YAML().dump(picked, text)
    return "# Written at the end of training: how to build the model for inference.\n" + text.getvalue()


def _merge(tree, key, value):
    if isinstance(tree.get(key), dict):
        for inner, item in value.items():
            _merge(tree[key], inner, item)
    else:
        tree[key] = value


class _Plain:
    """Convert training hparams to the grammar of model folders: references to objects stay, all others become values."""

    def __init__(self, tree, hparams):
        self._tree, self._hparams = tree, hparams

    def __call__(self, node):
        tag = tag_of(node)
        if tag in ("!ref", "!copy"):
            return self._referred(node)
        if isinstance(node, dict):
            new = CommentedMap((key, self(value)) for key, value in node.items())
        elif isinstance(node, list):
            new = CommentedSeq(self(value) for value in node)
        elif re.fullmatch(r"\([\w\s.,+-]*\)", str(getattr(node, "value", node))):  # a tuple of HyperPyYAML
            return ruamel.yaml.YAML(typ="safe").load(f"[{getattr(node, 'value', node)[1:-1]}]")
        else:
            return node
        if tag:
            new.yaml_set_ctag(ruamel.yaml.Tag(suffix=tag))
        return new

    def _referred(self, node):
        single = re.fullmatch(r"<(\w+)>", node.value)
        if single and single[1] in self._tree:
            target = self._tree[single[1]]
            if _is_object(target):
                return node
            if tag_of(target).startswith("!apply:"):
                return _number(self._hparams[single[1]], node.value)
            return self(target)
        attribute = re.fullmatch(r"<(\w+)\.(\w+)>", node.value)
        if attribute and attribute[1] in self._tree:
            return _number(getattr(self._hparams[attribute[1]], attribute[2]), node.value)
        return _number(recursive_resolve(node.value, [], self._tree), node.value)


def _is_object(node):
    """Whether a value is an object or class, to which references must stay references."""
    return tag_of(node).startswith(("!new:", "!name:"))


def _number(value, said):
    """The value as plain numbers, texts, lists and mappings; other types are refused."""
    if isinstance(value, (list, tuple)):
        return [_number(item, said) for item in value]
    if isinstance(value, dict):
        return {key: _number(item, said) for key, item in value.items()}
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise UserError(f"!ref {said} in the hparams is a {type(value).__name__}, which a model folder cannot hold.")
    return value
