"""Encoders by name: the only place where names are resolved.

An encoder enters the registry in one of three ways:

* a module in ``speechbrain_ext/encoders`` whose class carries ``@register_encoder("name")``;
* the same decorator in anybody's code that has been imported;
* a Python entry point in the group ``speechbrain_ext.encoders`` of an installed package, ``name = "package.module:Class"``.
"""

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points

ENTRY_POINT_GROUP = "speechbrain_ext.encoders"

_ENCODERS: dict[str, type] = {}


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
        If another class already has this name.

    Example
    -------
    >>> import torch
    >>> from speechbrain_ext.registry import build_encoder, register_encoder
    >>> @register_encoder("identity")
    ... class Identity(torch.nn.Module):
    ...     def __init__(self, d_model=8, nhead=1, num_layers=1, d_ffn=None, dropout=0.0):
    ...         super().__init__()
    >>> build_encoder("identity", d_model=4)
    Identity()
    >>> _ = _ENCODERS.pop("identity")  # leave no trace for the next reader
    """

    def decorate(cls):
        known = _ENCODERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"The encoder name '{name}' is taken by {known.__module__}.{known.__qualname__}; "
                f"register {cls.__module__}.{cls.__qualname__} under another name."
            )
        _ENCODERS[name] = cls
        return cls

    return decorate


def _import_shipped() -> None:
    """Importing a shipped encoder's module registers it."""
    from speechbrain_ext import encoders

    for module in pkgutil.iter_modules(encoders.__path__):
        importlib.import_module(f"{encoders.__name__}.{module.name}")


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
    """The class behind a name.

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
    if name not in _ENCODERS:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name == name:
                _ENCODERS[name] = point.load()
                break
        else:
            raise ValueError(f"Unknown encoder '{name}'; the known ones are: {', '.join(list_encoders())}.")
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
    for base in get_encoder(name).__mro__:  # a constructor with **kwargs hands on to the next one
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        keys += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in keys]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return keys


def encoder_sizes(name: str) -> list[str]:
    """The named sizes of an encoder: what its constructor key ``size`` takes, by the ``sizes`` of its class.

    Arguments
    ---------
    name : str
        A registered name.

    Returns
    -------
    list of str
        Empty where it has none.

    Example
    -------
    >>> encoder_sizes("squeezeformer")
    ['xs', 's', 'sm', 'm', 'ml', 'l']
    """
    return list(getattr(get_encoder(name), "sizes", ()))


def build_encoder(name: str, **kwargs):
    """Build an encoder by name.

    Arguments
    ---------
    name : str
        A registered name.
    **kwargs
        Keys of that encoder; all understand ``d_model``, ``nhead``, ``num_layers``, ``d_ffn`` and ``dropout``, all have defaults.

    Returns
    -------
    torch.nn.Module
        The encoder; see the contract in ``speechbrain_ext/encoders/__init__.py``.

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
            raise TypeError(f"The encoder '{name}' has no key '{key}'; its keys are: {', '.join(keys)}.")
    return cls(**kwargs)
