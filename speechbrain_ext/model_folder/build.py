"""Build a model from the text of its ``hyperparams.yaml``, without running code that the text chooses.

HyperPyYAML calls anything that a file names, and resolves references before it checks tags. It must not read untrusted files.
This module parses the file into nodes, which builds nothing. Every node must fit the small grammar below. Objects are then built
from these nodes, only with the classes of :mod:`speechbrain_ext.model_folder.allowlist`.

====================================== =======================================================================================
mapping, list, number, text, null      plain values; keys are texts; no anchors, aliases or merges, and no text that begins
                                        with "(", which HyperPyYAML would read as a tuple
``!ref <key>``                          the value of another key of the file; all references to a key give the same object;
                                        limits of size count a file with all references written out
``!new:module.Class`` with arguments    an object
``!name:module.Class`` with arguments   a class or function, with arguments if there are any
====================================== =======================================================================================

SpeechBrain's loader reads the same files and gives the same objects.
"""

import contextlib
import functools
import math
import re
from itertools import zip_longest

import ruamel.yaml
import torch
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from speechbrain_ext.model_folder.allowlist import WITHOUT_ARGUMENTS, find_class, find_name
from speechbrain_ext.utils.errors import UserError, one_line, runs_foreign_code, yaml_problem

LARGEST_TEXT, MOST_NODES, DEEPEST, LONGEST_TAG = 2**17, 5_000, 40, 200
"""Limits of a file: characters, nodes, nesting and characters of a tag. Our files have 3 kB, 300 nodes and 9 levels; a key has
at most 100 nodes with all references written out."""

LARGEST_NUMBER = 1_000_000
"""Largest whole number in a file. It limits sizes, counts, tokens and rates, and so the work of loops and the size of tables."""
SPARE_ELEMENTS, SPARE_CALLS = 50_000_000, 20_000
"""Elements that building may create in addition to the weights, such as tables, and its calls of PyTorch: seconds at most."""
ELEMENTS_PER_BYTE, CALLS_PER_TENSOR = 2, 50
"""Further elements and calls for the weights in the file. Our classes create each weight once, with about 5 calls of PyTorch."""

_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str")}
_LIST, _MAPPING = "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"
_REFERENCE = re.compile(r"<(\w+)>")


class Refused(UserError):
    """A file with content outside the grammar; the message is that content."""

    def __init__(self, what):
        super().__init__(one_line(what, 200))


def parse(text):
    """Parse a file into nodes, and check that it fits the grammar.

    Arguments
    ---------
    text : str
        The content of a ``hyperparams.yaml``.

    Returns
    -------
    dict
        Nodes by top-level key.

    Raises
    ------
    Refused
        If the file has other content; the message is that content.
    UserError
        If the file is not valid YAML.

    Example
    -------
    >>> list(parse("norm: !new:torch.nn.ModuleList []"))
    ['norm']
    >>> parse("norm: !apply:os.system [rm]")
    Traceback (most recent call last):
    speechbrain_ext.model_folder.build.Refused: !apply:os.system
    """
    if len(text) > LARGEST_TEXT:
        raise Refused(f"{len(text)} characters")
    if directive := re.search("^%.*", text, re.MULTILINE):
        raise Refused(f"the directive {directive[0]}")
    try:
        root = _compose(text)
    except ruamel.yaml.YAMLError as error:
        raise UserError("it is not valid YAML: {}{}".format(*yaml_problem(error))) from error
    except (RecursionError, ValueError) as error:  # ValueError: characters that YAML does not allow
        raise Refused(f"YAML that is not allowed ({one_line(error, 100)})") from error
    if not isinstance(root, MappingNode) or root.tag != _MAPPING:
        raise UserError("it holds no keys")
    _check(root, set(), 0)
    nodes = {key.value: value for key, value in root.value}
    sizes = {}
    for key, node in nodes.items():
        sizes[key] = _size(node, nodes, sizes, (key,))
    return nodes


def build(text, weights=None):
    """Build the objects that a file describes.

    Arguments
    ---------
    text : str
        The content of a ``hyperparams.yaml``.
    weights : tuple of int, optional
        Bytes and number of the weights for the model. A far larger model is refused before it fills the memory.

    Returns
    -------
    dict
        Values by top-level key.

    Raises
    ------
    UserError
        As :func:`parse`; also if a class refuses its arguments, or the model is far larger than its weights.

    Example
    -------
    >>> build("size: 3\\nhead: !new:speechbrain.nnet.linear.Linear {input_size: !ref <size>, n_neurons: 2}")["head"].w.in_features
    3
    """
    nodes = parse(text)
    with contextlib.nullcontext() if weights is None else _Budget(*weights):
        return _Builder(nodes).all()


def _compose(text):
    """The root node, with tags as HyperPyYAML's loader reads them; builds nothing."""
    loader = ruamel.yaml.SafeLoader(text)
    try:
        return loader.get_single_node()
    finally:
        if hasattr(loader, "dispose"):
            loader.dispose()


def _check(node, seen, depth):
    """Refuse a node outside the grammar; the tag is checked first."""
    if id(node) in seen or getattr(node, "anchor", None):
        raise Refused(f"the anchor or alias '{node.anchor}'")
    seen.add(id(node))
    if len(seen) > MOST_NODES or depth > DEEPEST:
        raise Refused(f"more than {MOST_NODES} values" if depth <= DEEPEST else f"more than {DEEPEST} levels")
    tag = str(node.tag)
    if len(tag) > LONGEST_TAG:
        raise Refused(f"a tag of {len(tag)} characters, {tag[:40]}")
    if tag.startswith(("!new:", "!name:")):
        kind, _, path = tag.partition(":")
        if (find_class if kind == "!new" else find_name)(path) is None:
            raise Refused(tag)
        if isinstance(node, ScalarNode) and node.value:
            raise Refused(f"{tag} with the text '{node.value[:40]}'")
        if path in WITHOUT_ARGUMENTS and node.value:
            raise Refused(f"{tag} with arguments")
    elif isinstance(node, ScalarNode):
        if tag == "!ref":
            if not _REFERENCE.fullmatch(node.value):
                raise Refused(f"!ref {node.value[:60]}")
        elif tag not in _PLAIN:
            raise Refused(tag)
        elif node.value.startswith("("):
            raise Refused(f"the text '{node.value[:60]}'")
        else:
            _plain(node)
    elif tag != (_LIST if isinstance(node, SequenceNode) else _MAPPING):
        raise Refused(tag)
    if isinstance(node, MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, ScalarNode)]
        for key, value in node.value:
            if names.count(key.value) > 1:
                raise UserError(f"it is not valid YAML: duplicate key {key.value}")
            if not isinstance(key, ScalarNode) or str(key.tag) != "tag:yaml.org,2002:str" or key.anchor:
                raise Refused(f"the key {str(getattr(key, 'value', ''))[:40]!r} ({key.tag})")
            seen.add(id(key))
            _check(value, seen, depth + 1)
    elif isinstance(node, SequenceNode):
        for child in node.value:
            _check(child, seen, depth + 1)


def _plain(node):
    """The value of a number, text or null."""
    try:
        value = ruamel.yaml.SafeLoader("").construct_object(node)
    except Exception as error:  # such as "!!int abc"; constructors pass on any error of a conversion
        raise UserError(f"'{node.value[:40]}' is not a valid {str(node.tag).rpartition(':')[2]}") from error
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise UserError(f"the number {node.value[:40]} is larger than {LARGEST_NUMBER}")
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"'{node.value[:40]}' is not a number")
    return value


class _Budget(TorchDispatchMode):
    """Refuse a model that is far larger than its weights; a tensor that may be large is refused before it is created."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled here; the default would import PyTorch's whole compiler

    def __init__(self, size, tensors):
        super().__init__()
        self._elements = SPARE_ELEMENTS + ELEMENTS_PER_BYTE * size
        self._calls = SPARE_CALLS + CALLS_PER_TENSOR * tensors

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._spend(calls=1)
        if function.__name__.partition(".")[0].endswith("_"):  # in place
            return function(*args, **kwargs)
        if _most_elements(function, (args, kwargs)) > SPARE_ELEMENTS:
            self._spend(_elements_without_memory(function, args, kwargs))
            return function(*args, **kwargs)
        outputs = function(*args, **kwargs)
        self._spend(_elements(outputs))
        return outputs

    def _spend(self, elements=0, calls=0):
        self._elements -= elements
        self._calls -= calls
        if self._calls < 0 or self._elements < 0:
            raise UserError("it describes a model that is far larger than its weights")


def _most_elements(function, arguments):
    """An upper bound of the number of elements that a call creates."""
    leaves = tree_leaves(arguments)
    shapes = [leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if function.is_view:
        return 0
    if shapes and torch.Tag.pointwise in function.tags:
        # Broadcast from the last axis on; PyTorch's function for this would import its compiler
        return math.prod(max(sizes) for sizes in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1))
    most = math.prod((math.prod(shape) + 1.0) ** 2 for shape in shapes)  # squared: a vector may become a diagonal matrix
    for leaf in leaves:
        if isinstance(leaf, int):
            most *= abs(leaf) + 1.0
        elif isinstance(leaf, float) and leaf:  # a step between numbers may be small
            most *= (abs(leaf) + 1) * (1 / abs(leaf) + 1)
    return most


def _elements(outputs):
    """Number of elements of the tensors that a call created; views do not count."""
    made = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and not leaf._is_view())
    return sum(leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in made)


def _elements_without_memory(function, args, kwargs):
    """The number of elements that a call would create; 0 if it depends on the content of tensors."""
    args, kwargs = tree_map(_without_memory, (args, kwargs))
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not inputs or "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    try:
        return _elements(function(*args, **kwargs))
    except Exception:  # an invalid shape, or a shape that depends on the content; the call itself raises the error
        return 0


def _without_memory(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _size(node, nodes, sizes, above):
    """Number of values and levels of a node with references written out, as in a walk over the built objects.

    ``sizes`` has the known numbers by key, ``above`` the keys that lead to the node.
    """
    if node.tag == "!ref":
        key = _REFERENCE.fullmatch(node.value)[1]
        if key not in nodes:
            raise UserError(f"it refers to {node.value}, but has no such key")
        if key in above:
            raise UserError(f"its keys refer to each other in a circle: {', '.join(above)}")
        if len(above) > DEEPEST:
            raise Refused(f"references over more than {DEEPEST} keys")
        if key not in sizes:
            sizes[key] = _size(nodes[key], nodes, sizes, (*above, key))
        return sizes[key]
    children = [] if isinstance(node, ScalarNode) else node.value
    if isinstance(node, MappingNode):
        children = [value for _, value in children]
    below = [_size(child, nodes, sizes, above) for child in children]
    size, levels = 1 + sum(size for size, _ in below), 1 + max((levels for _, levels in below), default=0)
    if size > MOST_NODES or levels > DEEPEST:
        raise Refused(f"references that make more than {MOST_NODES} values or {DEEPEST} levels")
    return size, levels


class _Builder:
    """Build objects from checked nodes, each key once."""

    def __init__(self, nodes):
        self._nodes, self._built = nodes, {}

    def all(self):
        return {key: self._key(key) for key in self._nodes}

    def _key(self, key):
        if key not in self._built:
            self._built[key] = self._value(self._nodes[key])
        return self._built[key]

    def _value(self, node):
        tag = str(node.tag)
        if tag == "!ref":
            return self._key(_REFERENCE.fullmatch(node.value)[1])
        if isinstance(node, ScalarNode) and tag in _PLAIN:
            return _plain(node)
        if isinstance(node, MappingNode):
            args, kwargs = (), {key.value: self._value(value) for key, value in node.value}
        elif isinstance(node, SequenceNode):
            args, kwargs = [self._value(child) for child in node.value], {}
        else:
            args, kwargs = (), {}
        if tag == _MAPPING:
            return kwargs
        if tag == _LIST:
            return args
        kind, _, path = tag.partition(":")
        if kind == "!name":
            target = find_name(path)
            return functools.partial(target, *args, **kwargs) if args or kwargs else target
        try:
            return find_class(path)(*args, **kwargs)
        except Exception as error:
            # Classes of this and other packages raise any kind of error for a wrong value. An error in the user's code is a
            # bug, and keeps its traceback.
            if isinstance(error, UserError) or runs_foreign_code(error):
                raise
            raise UserError(f"{path} refuses its arguments: {one_line(error)}") from error
