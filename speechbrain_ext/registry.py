"""Registry of encoders with their sizes, and of the classes that a model folder may name.

An encoder enters the registry in one of three ways:

* a module in ``speechbrain_ext/encoders`` whose class has the decorator ``@register_encoder("name")``;
* the same decorator in any code that has been imported;
* a Python entry point in the group ``speechbrain_ext.encoders`` of an installed package, ``name = "package.module:Class"``.

A class that a model folder may name, such as your own subsampling, has the decorator ``@loadable`` in imported code, or is an
entry point in the group ``speechbrain_ext.loadable``: ``"package.module.Class" = "package.module:Class"``.
"""

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points

import numpy

from speechbrain_ext.utils.errors import UserError, UserTypeError

SHIPPED = "speechbrain_ext.encoders"
ENTRY_POINT_GROUP = "speechbrain_ext.encoders"
LOADABLE_GROUP = "speechbrain_ext.loadable"

_ENCODERS: dict[str, type] = {}
_LOADABLE: dict[str, object] = {}


def register_encoder(name: str):
    """Class decorator that makes an encoder available under a name.

    Arguments
    ---------
    name : str
        The name that hparams files and :func:`build_encoder` use.

    Returns
    -------
    callable
        The decorator; it returns the class unchanged.

    Raises
    ------
    ValueError
        If the name is no text, or another class already has it.

    Example
    -------
    >>> import torch
    >>> from speechbrain_ext.registry import build_encoder, register_encoder
    >>> @register_encoder("identity")                                   # doctest: +SKIP
    ... class Identity(torch.nn.Module):
    ...     def __init__(self, d_model=8, nhead=1, num_layers=1, d_ffn=None, dropout=0.0):
    ...         super().__init__()
    >>> build_encoder("identity", d_model=4)                            # doctest: +SKIP
    Identity()
    """

    if not isinstance(name, str):
        raise UserError(f'The name of an encoder is {name!r}; give a text: @register_encoder("name").')

    def decorate(cls):
        known = _ENCODERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(
                f"The encoder name '{name}' is taken by {known.__module__}.{known.__qualname__}; "
                f"register {cls.__module__}.{cls.__qualname__} under another name."
            )
        _ENCODERS[name] = cls
        return cls

    return decorate


def _import_shipped() -> None:
    """Import the modules of the shipped encoders, which registers them."""
    encoders = importlib.import_module(SHIPPED)
    for module in pkgutil.iter_modules(encoders.__path__):
        importlib.import_module(f"{SHIPPED}.{module.name}")


def list_encoders() -> list[str]:
    """Names of all encoders, sorted: shipped, registered by decorator, and offered by entry points.

    Returns
    -------
    list of str

    Example
    -------
    >>> "hyperconformer" in list_encoders()
    True
    """
    _import_shipped()
    return sorted({*_ENCODERS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def get_encoder(name: str) -> type:
    """The encoder class with a name.

    Arguments
    ---------
    name : str
        A registered name.

    Returns
    -------
    type

    Raises
    ------
    ValueError
        If no encoder has this name; the message lists those that exist.

    Example
    -------
    >>> get_encoder("conformer").__name__
    'ConformerEncoder'
    """
    _import_shipped()
    if not isinstance(name, str) or name not in _ENCODERS:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name == name:
                _ENCODERS[name] = point.load()
                break
        else:
            raise UserError(f"Unknown encoder '{name}'; the known ones are: {', '.join(list_encoders())}.")
    return _ENCODERS[name]


def encoder_keys(name: str) -> list[str]:
    """The constructor keys of an encoder.

    Arguments
    ---------
    name : str
        A registered name.

    Returns
    -------
    list of str

    Example
    -------
    >>> encoder_keys("hyperconformer")[:5]
    ['d_model', 'nhead', 'num_layers', 'd_ffn', 'dropout']
    """
    keys = []
    for base in get_encoder(name).__mro__:  # a constructor with **kwargs passes keys on to the next one
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        keys += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in keys]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return keys


def encoder_sizes(name: str) -> dict:
    """The named sizes of an encoder: the values of its constructor key ``size``, from the ``sizes`` of its class.

    Arguments
    ---------
    name : str
        A registered name.

    Returns
    -------
    dict
        Rows by name: objects with at least ``d_model``, ``nhead``, ``num_layers`` and ``d_ffn``. Empty if the encoder has no
        named sizes.

    Example
    -------
    >>> list(encoder_sizes("squeezeformer"))
    ['xs', 's', 'sm', 'm', 'ml', 'l']
    """
    return getattr(get_encoder(name), "sizes", {})


def passes_of(encoder) -> tuple:
    """The names of an encoder's passes, the best one last. Only a cascade has more than one.

    Example
    -------
    >>> passes_of(build_encoder("conformer", d_model=8, nhead=2, num_layers=1, d_ffn=8))
    ('single',)
    """
    return getattr(encoder, "passes", ("single",))


def encoder_name(encoder) -> str:
    """The registered name of an encoder, or the name of its class if it has none.

    Example
    -------
    >>> encoder_name(build_encoder("conformer", d_model=8, nhead=2, num_layers=1, d_ffn=8))
    'conformer'
    """
    _import_shipped()
    return next((name for name, kind in _ENCODERS.items() if kind is type(encoder)), type(encoder).__name__)


def encoder_passes(encoder, pass_name: str | None = None) -> dict:
    """The keyword that selects a pass of an encoder: ``encoder(x, **encoder_passes(encoder, "first"))``.

    Arguments
    ---------
    encoder : torch.nn.Module
        An encoder.
    pass_name : str, optional
        Name of the pass.

    Returns
    -------
    dict
        Empty for the default, the last pass.

    Raises
    ------
    UserError
        If the encoder has no such pass.

    Example
    -------
    >>> encoder_passes(build_encoder("cascade", d_model=8, nhead=2, num_layers=2, d_ffn=8), "first")
    {'pass_name': 'first'}
    """
    passes = passes_of(encoder)
    if pass_name is None or (len(passes) == 1 and pass_name == passes[0]):
        return {}
    if len(passes) == 1:
        raise UserError(f"A {type(encoder).__name__} is no cascade: it has one pass, and no '{pass_name}'; leave the pass out.")
    if pass_name not in passes:
        raise UserError(f"The pass is '{pass_name}'; give {' or '.join(passes)}.")
    return {"pass_name": pass_name}


def encoder_size(name: str, size: str):
    """A named size of an encoder, for hparams files: ``row: !apply:speechbrain_ext.registry.encoder_size [squeezeformer, xs]``.

    Arguments
    ---------
    name : str
        A registered name.
    size : str
        The name of a size.

    Returns
    -------
    object
        The row of :func:`encoder_sizes`.

    Raises
    ------
    UserError
        If there is no such size; the message lists those that exist.

    Example
    -------
    >>> encoder_size("squeezeformer", "xs").d_model
    144
    """
    sizes = encoder_sizes(name)
    if size not in list(sizes):
        known = f"the sizes are: {', '.join(sizes)}." if sizes else "it has no named sizes."
        raise UserError(f"There is no {name} of size '{size}'; {known}")
    return sizes[size]


def loadable(target):
    """Class decorator that allows model folders to name a class, which is then built from the folder's values.

    Arguments
    ---------
    target : type
        The class. Its constructor must be safe with any arguments from a file: it reads no file and calls nothing by name.

    Returns
    -------
    type
        The class itself.

    Example
    -------
    >>> @loadable
    ... class FrontEnd: ...
    >>> find_loadable(f"{FrontEnd.__module__}.FrontEnd") is FrontEnd
    True
    """
    _LOADABLE[f"{target.__module__}.{target.__qualname__}"] = target
    return target


def find_loadable(path: str):
    """The class at a path, if a model folder may name it. This imports only installed entry points.

    Arguments
    ---------
    path : str
        Such as ``speechbrain_ext.lobes.subsampling.ConvolutionSubsampling``.

    Returns
    -------
    type or None
    """
    if path not in _LOADABLE:
        for point in entry_points(group=LOADABLE_GROUP):
            if point.name == path:
                _LOADABLE[path] = point.load()
    return _LOADABLE.get(path)


def build_encoder(name: str, **kwargs):
    """Build an encoder by name.

    Arguments
    ---------
    name : str
        A registered name.
    **kwargs
        Keys of that encoder. All encoders have ``d_model``, ``nhead``, ``num_layers``, ``d_ffn`` and ``dropout``, with defaults.

    Returns
    -------
    torch.nn.Module
        The encoder; see the contract in :mod:`speechbrain_ext.encoders`.

    Raises
    ------
    ValueError
        If the name is unknown, or a size is impossible.
    TypeError
        If the encoder has no such key.

    Example
    -------
    >>> import torch
    >>> encoder = build_encoder("hyperconformer", d_model=32, nhead=4, num_layers=2, d_ffn=64)
    >>> out, _ = encoder(torch.rand(2, 50, 32))
    >>> out.shape
    torch.Size([2, 50, 32])
    """
    cls = get_encoder(name)
    keys = encoder_keys(name)
    for key in kwargs:
        if key not in keys:
            raise UserTypeError(f"The encoder '{name}' has no key '{key}'; its keys are: {', '.join(keys)}.")
    # A compiler would take numpy's numbers for tensors
    return cls(**{key: value.item() if isinstance(value, numpy.generic) else value for key, value in kwargs.items()})
