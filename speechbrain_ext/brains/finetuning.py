"""Frozen parts of a model, and parts with a separate learning rate."""

import contextlib
import math

from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.prefixes import begins_with, check_prefixes


class Frozen:
    """Parts of a model that get no gradient and stay in evaluation mode: no dropout, and statistics that do not change.

    Arguments
    ---------
    model : torch.nn.Module
        The model to train. Its ``train()`` leaves the modules of its ``frozen`` in evaluation mode.
    parts : torch.nn.Module
        The same model with the names of a model folder (:func:`speechbrain_ext.model_folder.write.model_parts`).
    prefixes : list of str
        Prefixes of these names, such as ``transformer.encoder.layers.0``.
    steps : int
        The optimizer step from which they are trained like the others; 0 = never.

    Raises
    ------
    UserError
        If a prefix matches nothing, everything would be frozen, or there are steps but nothing to freeze.

    Example
    -------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    >>> frozen = Frozen(model, model, ["0"], steps=10)
    >>> frozen.update(9), model[0].weight.requires_grad
    (False, False)
    >>> frozen.update(10), model[0].weight.requires_grad
    (True, True)
    """

    def __init__(self, model, parts, prefixes, steps=0):
        self.model, self.parts, self.steps = model, parts, steps
        names = list(parts.state_dict())
        check_prefixes("freeze", prefixes, names)
        prefixes = [prefix.rstrip(".") for prefix in prefixes]
        self.names = {name for name in names if any(begins_with(name, prefix) for prefix in prefixes)}
        self.modules = [module for name, module in parts.named_modules() if name in prefixes]
        self.parameters = [parameter for name, parameter in parts.named_parameters() if name in self.names]
        if len(self.parameters) == len(list(parts.parameters())):
            raise UserError("freeze leaves nothing to train; name fewer parts.")
        if steps and not prefixes:
            raise UserError(f"freeze_steps is {steps}, and freeze names no part; name some, or give 0 for freeze_steps.")
        self.holds = bool(prefixes)
        self._set(self.holds)

    def update(self, step):
        """Unfreeze if it is time, and return whether it was. This depends only on the step, as runs can be interrupted."""
        if not self.holds or not self.steps or step < self.steps:
            return False
        self.holds = False
        self._set(False)
        return True

    @contextlib.contextmanager
    def lifted(self):
        """Context in which parts frozen for some steps require a gradient: DistributedDataParallel checks only at the start."""
        self._set(self.holds and not self.steps)
        yield
        self._set(self.holds)

    def state(self):
        """Copies of all tensors that are frozen now, by name."""
        return {name: value.clone() for name, value in self.parts.state_dict().items() if self.holds and name in self.names}

    def _set(self, holds):
        for parameter in self.parameters:
            parameter.requires_grad_(not holds)
        self.model.frozen = self.modules if holds else []


def check_scales(scales, parts):
    """Refuse impossible factors of learning rates, and factors for parts that do not exist.

    Arguments
    ---------
    scales : dict
        Factors by prefix of names in a model folder.
    parts : torch.nn.Module
        The model with these names.

    Raises
    ------
    UserError
        If a prefix matches nothing, or a factor is not a number above 0.
    """
    check_prefixes("lr_scales", scales, parts.state_dict())
    for prefix, factor in scales.items():
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < math.inf:
            raise UserError(f"lr_scales has {factor!r} for {prefix}; give a number above 0, or name the part in freeze.")


def scaled_groups(parameters, scales, parts):
    """Groups of parameters for an optimizer, one for each factor of the learning rate.

    Arguments
    ---------
    parameters : iterable
        Parameters, or groups of them as optimizers take them.
    scales : dict
        Factors by prefix of names in a model folder; the longest prefix wins.
    parts : torch.nn.Module
        The model with these names.

    Returns
    -------
    list of dict
        Groups with their factor as ``lr_scale``.

    Example
    -------
    >>> import torch
    >>> parts = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    >>> groups = scaled_groups(parts.parameters(), {"encoder": 0.1, "encoder.bias": 0.5}, parts)
    >>> [(len(group["params"]), group["lr_scale"]) for group in groups]
    [(1, 0.1), (1, 0.5), (2, 1)]
    """
    factors = {}
    for name, parameter in parts.named_parameters():
        fitting = [prefix for prefix in scales if begins_with(name, prefix)]
        factors[parameter] = scales[max(fitting, key=len)] if fitting else 1
    parameters, groups = list(parameters), []
    for group in parameters if isinstance(parameters[0], dict) else [{"params": parameters}]:
        by_factor = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(parameter, 1), []).append(parameter)
        groups += [group | {"params": members, "lr_scale": factor} for factor, members in by_factor.items()]
    return groups


@contextlib.contextmanager
def scaled_rates(optimizer):
    """Context in which each group of an optimizer has its own learning rate. Schedulers set one rate for all groups."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * group.get("lr_scale", 1)
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
