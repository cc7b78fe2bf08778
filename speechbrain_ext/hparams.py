"""Reading hparams files: HyperPyYAML with one addition. A file can extend another one, and state only the differences.

A file whose first key is ``extends: other.yaml`` (a path relative to it) overrides that file, as HyperPyYAML's ``overrides`` do:
scalars and lists replace, mappings merge. Two kinds of mappings replace the old one instead: a mapping with a tag (``!new:...``),
as another class has other keys, and ``card``. Chains may have any depth. With ``extends: [a.yaml, b.yaml]``, ``b.yaml`` overrides
``a.yaml``, and the file overrides both.
"""

import copy
import difflib
import re
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from hyperpyyaml.core import recursive_update

from speechbrain_ext.utils.errors import UserError, one_line, raised_in, yaml_problem

EXTENDS = "extends"
WHOLE = ("card",)
"""Keys whose mappings replace the old mapping: the card of one corpus is not true of another."""


def merge_hparams(paths, overrides=""):
    """Merge hparams files and overrides into one text, with references unresolved.

    Arguments
    ---------
    paths : str, os.PathLike, or a sequence of them
        An hparams file, or several: each overrides those before it. All but the first may also be mappings.
    overrides : str or dict
        Values to replace, as YAML text (such as ``speechbrain.parse_arguments`` makes from the command line) or a mapping.

    Returns
    -------
    str
        A HyperPyYAML text.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file or the overrides are no YAML mapping, a file extends itself, or an override names a key that no file has.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "base.yaml").write_text("size: 1\\ndouble: !ref <size> * 2\\n")
    >>> _ = (folder / "large.yaml").write_text("extends: base.yaml\\nsize: 10\\n")
    >>> load_hparams(folder / "large.yaml")
    {'size': 10, 'double': 20}
    >>> load_hparams(folder / "large.yaml", "size: 4")
    {'size': 4, 'double': 8}
    >>> load_hparams(folder / "large.yaml", "sice: 4")
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: Unknown key 'sice' for large.yaml; did you mean 'size'?
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    tree = merged_tree(paths)
    if isinstance(overrides, str):
        overrides = parse_overrides(overrides)
    check_known(overrides, tree, Path(paths[0]).name)
    text, tree = StringIO(), _override(tree, overrides)
    _as_block(tree)
    ruamel.yaml.YAML().dump(tree, text)
    return text.getvalue()


def check_known(overrides, tree, name, options=()):
    """Refuse overrides of keys that do not exist, with the most similar name.

    Arguments
    ---------
    overrides : dict
        Values by key.
    tree : dict
        The keys that exist.
    name : str
        The name of the hparams file.
    options : sequence of str
        Names of other options of the command line.

    Raises
    ------
    UserError
        If a key does not exist.

    Example
    -------
    >>> check_known({"size": 1}, {"batches": {"size": 2}}, "a.yaml")
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: Unknown key 'size' for a.yaml; did you mean 'batches: {size: 1}'?
    """
    inner = {part: key for key, node in [*tree.items()][::-1] if isinstance(node, dict) for part in node}
    for key, value in overrides.items():
        if key not in tree:
            near = near_key(key, [*tree, *(option for option in options if option != key)])
            if not near and (part := near_key(key, inner, 0.85)):
                near = f"{inner[part]}: {{{part}: {as_plain(value)}}}"
            hint = f"did you mean '{near}'?" if near else "docs/hparams.md lists the keys."
            raise UserError(f"Unknown key '{key}' for {name}; {hint}")


def merged_tree(paths):
    """The tree of merged hparams files, with references unresolved.

    Arguments
    ---------
    paths : sequence of str, os.PathLike or dict
        As in :func:`merge_hparams`.

    Returns
    -------
    dict
    """
    tree = None
    for path in paths:
        tree = _override(tree, copy.deepcopy(path) if isinstance(path, dict) else _read(Path(path)))
    return tree


def load_hparams(paths, overrides=""):
    """Load hparams files: merge them and build the objects that they describe.

    Arguments
    ---------
    paths : str, os.PathLike, or a sequence of them
        As in :func:`merge_hparams`.
    overrides : str or dict
        As in :func:`merge_hparams`.

    Returns
    -------
    dict
        The values by key.

    Raises
    ------
    FileNotFoundError, ValueError
        As in :func:`merge_hparams`, and if a value is missing.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "count.yaml"
    >>> _ = path.write_text("letters: !new:collections.Counter\\n    a: 3\\n")
    >>> load_hparams(path)["letters"]["a"]
    3
    """
    with _explained():
        return load_hyperpyyaml(merge_hparams(paths, overrides))


def resolve_hparams(paths, overrides=""):
    """The values of hparams files, references resolved, before any object is built.

    Arguments
    ---------
    paths : str, os.PathLike, or a sequence of them
        As in :func:`merge_hparams`.
    overrides : str or dict
        As in :func:`merge_hparams`.

    Returns
    -------
    dict
        An object to build is still a mapping or list with a tag.
    """
    with _explained():
        return ruamel.yaml.YAML().load(resolve_references(merge_hparams(paths, overrides)))


@contextmanager
def _explained():
    """Turn HyperPyYAML's errors into a UserError: about a reference, a placeholder, a class that is missing or refuses its keys.

    An error that a class of another package raises is a bug of that class, or already a UserError. But SpeechBrain's classes
    refuse settings with such errors.
    """
    try:
        yield
    except (TypeError, ValueError, ImportError, AssertionError, RecursionError, ruamel.yaml.YAMLError) as error:
        # HyperPyYAML adds a line to the error of a class
        is_plain = isinstance(error, UserError) and len(error.args) == 1
        if is_plain or not (isinstance(error, UserError) or raised_in(error, "hyperpyyaml", "yaml", "ruamel", "speechbrain")):
            raise
        said = ": ".join(one_line(part) for part in error.args) or one_line(error)
        if isinstance(error, ImportError) and said.startswith("There is no such"):
            said += "; check the name; a module of your own is found beside the hparams file, or if its package is installed."
        if isinstance(error, ruamel.yaml.YAMLError):
            problem, line = yaml_problem(error)
            # HyperPyYAML does not resolve them
            left = "a reference leads to itself, such as lr: !ref <lr>, or to a reference below it; give a value in its place"
            said = f"The hparams are not valid: {left if repr('!ref') in problem else problem + line}."
        raise UserError(said) from error


def parse_overrides(text):
    """Overrides as a mapping.

    Arguments
    ---------
    text : str
        YAML text, such as ``speechbrain.parse_arguments`` makes from the command line.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If the text is no YAML mapping.

    Example
    -------
    >>> parse_overrides("lr: 0.1")["lr"]
    0.1
    """
    return _parse(text, "The command line") if text.strip() else {}


def needed_keys(tree, node):
    """The top-level keys that a node refers to, directly or through other keys.

    Arguments
    ---------
    tree : dict
        Parsed hparams with references unresolved.
    node : object
        Any part of parsed hparams.

    Returns
    -------
    set of str

    Example
    -------
    >>> tree = ruamel.yaml.YAML().load("{a: 1, b: !ref <a> * 2, c: [!ref <b>], d: 4}")
    >>> sorted(needed_keys(tree, tree["c"]))
    ['a', 'b']
    """
    needed, unseen = set(), _references(node)
    while unseen:
        needed |= unseen
        unseen = set().union(*(_references(tree[key]) for key in unseen if key in tree)) - needed
    return needed


def _references(node):
    """The top-level keys that a node refers to."""
    if isinstance(node, dict):
        return set().union(*map(_references, node.values()))
    if isinstance(node, list):
        return set().union(*map(_references, node))
    return set(re.findall(r"<([^>.\[]+)", node.value)) if tag_of(node) in ("!ref", "!copy") else set()


def tag_of(node):
    """The tag of a part of parsed hparams, such as ``!new:package.Class``; empty if it has none."""
    return getattr(getattr(node, "tag", None), "value", None) or ""


def as_plain(node):
    """A part of parsed hparams as plain values, with tags as text and without comments."""
    if isinstance(node, dict):
        plain = {key: as_plain(value) for key, value in node.items()}
    elif isinstance(node, list):
        plain = [as_plain(value) for value in node]
    else:
        plain = node.value if tag_of(node) else node
    return f"{tag_of(node)} {plain}" if tag_of(node) else plain


def _read(path, extended_by=()):
    """The tree of a file, merged with the files that it extends."""
    path = path.resolve()
    if path in extended_by:
        raise UserError(f"The hparams file {path} extends itself; remove one of the '{EXTENDS}' keys.")
    try:
        own = own_keys(path)
    except (FileNotFoundError, IsADirectoryError):
        origin = f", which {extended_by[-1]} extends" if extended_by else ""
        raise FileNotFoundError(f"There is no hparams file {path}{origin}; check the path.") from None
    tree = None
    if EXTENDS in own:
        if next(iter(own)) != EXTENDS:
            raise UserError(f"In {path} the key '{EXTENDS}' must be the first one; move it to the top.")
        for base in pop_extended(own, path):
            tree = _override(tree, _read(base, (*extended_by, path)))
    return _override(tree, own)


def own_keys(path):
    """The keys that a file states itself.

    Arguments
    ---------
    path : str or os.PathLike
        An hparams file.

    Returns
    -------
    dict
        With references unresolved.

    Raises
    ------
    OSError
        If the file cannot be read.
    UserError
        If it is not text in UTF-8, or no YAML mapping.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "large.yaml"
    >>> _ = path.write_text("extends: base.yaml\\nsize: 10\\n")
    >>> dict(own_keys(path))
    {'extends': 'base.yaml', 'size': 10}
    """
    try:
        return _parse(Path(path).read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8; save it in UTF-8.") from error


def pop_extended(own, path):
    """Remove ``extends`` from the keys of a file; returns the files that it names.

    Arguments
    ---------
    own : dict
        From :func:`own_keys`; changed in place.
    path : pathlib.Path
        The file.

    Returns
    -------
    list of pathlib.Path

    Raises
    ------
    UserError
        If the value is neither a file nor a list of files.

    Example
    -------
    >>> own = {"extends": "base.yaml", "size": 10}
    >>> [base.name for base in pop_extended(own, Path("large.yaml"))], own
    (['base.yaml'], {'size': 10})
    """
    if EXTENDS not in own:
        return []
    bases = own.pop(EXTENDS)
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not bases or not all(isinstance(base, str) for base in bases):
        raise UserError(f"In {path} the key '{EXTENDS}' is {bases!r}; give a file, or a list of files.")
    return [path.parent / base for base in bases]


def near_key(key, keys, cutoff=0.7):
    """The most similar one of some keys; empty if none is similar."""
    return next(iter(difflib.get_close_matches(str(key), map(str, keys), n=1, cutoff=cutoff)), "")


def _parse(text, name):
    try:
        tree = ruamel.yaml.YAML().load(text)
    except ruamel.yaml.YAMLError as error:
        raise UserError("{} is no valid YAML: {}{}.".format(name, *yaml_problem(error))) from error
    if not isinstance(tree, dict):
        raise UserError(f"{name} should hold 'key: value' lines, but it is: {text.strip()[:60]!r}.")
    return tree


def _override(tree, overrides):
    if tree is None:
        return overrides
    for key, value in overrides.items():
        if key in WHOLE or _is_tagged(value) or (isinstance(value, dict) and not isinstance(tree.get(key), dict)):
            tree[key] = value  # where recursive_update would merge, or fail
        else:
            recursive_update(tree, {key: value})
    return tree


def _as_block(node):
    """Write lists of objects, and all around them, one item a line; returns whether there are any.

    Of ``[!new:A {b: 1}]`` ruamel.yaml writes ``[!new:A b: 1]``, here and in HyperPyYAML, and reads another thing from that.
    """
    parts = [*node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []
    found = any([_as_block(part) for part in parts]) or isinstance(node, list) and any(map(_is_tagged, node))
    if found and hasattr(node, "fa"):
        node.fa.set_block_style()
    return found


def _is_tagged(value):
    return isinstance(value, dict) and bool(tag_of(value))
