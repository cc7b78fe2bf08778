"""Whether a stranger's ``hyperparams.yaml`` names only the parts that a trained model needs.

HyperPyYAML calls what a file names, with the arguments that stand there. A look at the tags of the file as it is does not tell:
``!include:`` and ``!applyref:`` act before any object is built, a text in parentheses is parsed again by a loader that builds any
Python object, and references put texts together. So the two that act early are refused first, then references are resolved,
which builds nothing, and every node of the result must be one of those below, names as a whole and not by their beginning (the
name ``speechbrain.utils.fetching.shutil.rmtree`` is a function, too).
"""

import re
from io import StringIO

import ruamel.yaml
from hyperpyyaml import resolve_references

# What write_pretrained writes for the hparams files here, or wrote before (SpeechBrain's own searcher). Constructors and
# functions that take numbers, names of encoders and one another, and open no file that the arguments could name, apart from the
# tokenizer, which only parses it.
_TAGS = {
    "!apply:speechbrain_ext.encoders.practical_conformer.named_size",
    "!apply:speechbrain_ext.encoders.squeezeformer.published_size",
    "!name:speechbrain.decoders.ctc.ctc_greedy_decode",
    "!name:torch.nn.GELU",
    "!name:torch.nn.ReLU",
    "!name:torch.nn.SiLU",
    "!new:sentencepiece.SentencePieceProcessor",
    "!new:speechbrain.decoders.S2STransformerBeamSearcher",
    "!new:speechbrain.decoders.scorer.CTCScorer",
    "!new:speechbrain.decoders.scorer.ScorerBuilder",
    "!new:speechbrain.lobes.features.Fbank",
    "!new:speechbrain.nnet.linear.Linear",
    "!new:speechbrain.processing.features.InputNormalization",
    "!new:speechbrain_ext.lobes.features.SentenceNormalization",
    "!new:speechbrain_ext.asr.SpeechEncoder",
    "!new:speechbrain_ext.asr.TransformerASR",
    "!new:speechbrain_ext.inference.ctc_prefix.CTCScorer",
    "!new:speechbrain_ext.inference.searchers.S2STransformerBeamSearcher",
    "!new:speechbrain_ext.inference.weights.SafetensorsPretrainer",
    "!new:speechbrain_ext.lobes.subsampling.ConvolutionSubsampling",
    "!new:speechbrain_ext.lobes.subsampling.DepthwiseSubsampling",
    "!new:speechbrain_ext.lobes.subsampling.FusibleSubsampling",
    "!new:torch.nn.ModuleList",
    "!tuple",
    *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")),
}
_ATTRIBUTES = {"output_size", "d_model", "nhead", "num_layers", "d_ffn", "cascade_layers"}  # that !ref <key.attribute> may read
_TUPLE = re.compile(r"\([\w\s.,+-]*\)")  # numbers and words


def check_hparams(text):
    """Refuse hparams that name more than the parts of a trained model.

    Arguments
    ---------
    text : str
        The content of a ``hyperparams.yaml``.

    Raises
    ------
    ValueError
        If they do; the message is what they name.
    ruamel.yaml.YAMLError
        If the text is no YAML.

    Example
    -------
    >>> check_hparams("norm: !new:torch.nn.ModuleList []")
    >>> check_hparams("norm: !apply:os.system [rm]")
    Traceback (most recent call last):
    ValueError: !apply:os.system
    """
    _check_early(ruamel.yaml.YAML().load(text))
    resolved = resolve_references(text).getvalue()
    _check_node(ruamel.yaml.Loader(StringIO(resolved)).get_single_node(), set())  # the loader of HyperPyYAML, building nothing


def _check_early(tree):
    """What acts while references are resolved; looks where HyperPyYAML looks."""
    tag = getattr(getattr(tree, "tag", None), "value", None) or ""
    if tag.startswith(("!include", "!applyref")):
        raise ValueError(tag)
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for child in tree:
            _check_early(child)


def _check_node(node, seen):
    if node is None or id(node) in seen:  # an anchor is one node in several places
        return
    seen.add(id(node))
    children = []
    if isinstance(node, ruamel.yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, ruamel.yaml.SequenceNode):
        children = node.value
    # The tag first: whatever a node looks like, its tag decides what is built of it
    if node.tag == "!apply:getattr":
        if len(children) != 2 or children[1].value not in _ATTRIBUTES:
            raise ValueError(f"{node.tag} {[child.value for child in children[1:]]}")
    elif node.tag not in _TAGS:
        raise ValueError(node.tag)
    # A text in parentheses is parsed again, as Python objects of any kind
    if isinstance(node, ruamel.yaml.ScalarNode) and (node.tag == "!tuple" or node.value.startswith("(")):
        if not _TUPLE.fullmatch(node.value):
            raise ValueError(node.value)
    for child in children:
        _check_node(child, seen)
