"""A pretended GPU: tensors on a device ``pretend:0`` that keep their numbers in CPU tensors.

Python code, autograd and the dispatcher behave as on a GPU. Mixed devices raise. A Recorder lists all operations that make the
host wait for the device, or send data to it, with their lines. This uses torch's hooks for backends in Python
(``torch.utils.backend_registration``).

It cannot test autocast (this backend casts nothing), the speed of kernels, or communication between devices.
"""

import contextlib
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

try:
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
except ImportError:  # PyTorch 2.9
    pytest.skip("this version of PyTorch takes no backend in Python", allow_module_level=True)

if torch.cuda.is_available():  # PyTorch has one kind of accelerator at a time: CUDA's backward passes would fail beside this one
    pytest.skip("this machine has a GPU; CUDA_VISIBLE_DEVICES= hides it", allow_module_level=True)

NAME = "pretend"
CPU = torch.device("cpu")

SYNCS = {  # operators that wait for the device: the size or value of their result is only on the device
    "aten::_local_scalar_dense": "a number for Python (.item(), int(), bool(), if)",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::equal": "torch.equal",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::repeat_interleave": "repeat_interleave with a tensor",
    "aten::bincount": "bincount",
}
ALLOCATIONS = {
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::is_same_size",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::set_",
    "aten::squeeze_",
}
QUIET = {"aten::alias", "aten::detach", "aten::is_pinned", "aten::lift_fresh", "prim::device"}
COPIES = {"aten::_to_copy", "aten::copy", "aten::copy_"}
INDEXING = {"aten::_index_put_impl_", "aten::_unsafe_index", "aten::index", "aten::index_put", "aten::index_put_"}
CTC = {"aten::_ctc_loss": (2, 3), "aten::_ctc_loss_backward": (3, 4)}  # places of the lengths, which CUDA needs on the host
PRODUCTS = {"aten::addmm", "aten::baddbmm", "aten::bmm", "aten::convolution", "aten::mm"}


class _Backend(_DummyBackendModule):
    def is_available(self):
        return False  # never chosen by default

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


class DeviceMixError(RuntimeError):
    """An operator got tensors of two devices."""


class Pretend(torch.Tensor):
    """A tensor on ``DEVICE``, whose numbers are in the CPU tensor ``inner``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Pretend({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, Recorder.current)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of this device to numpy. Use Tensor.cpu() first.")

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                copy = Pretend(self.inner.clone())
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # torch.save writes CPU tensors
        return self.detach().cpu().__reduce_ex__(protocol)


for _module in (optimizer, _foreach_utils):  # take the paths with few launches, as CUDA's tensors do
    if Pretend not in getattr(_module, "_foreach_supported_types", [Pretend]):
        _module._foreach_supported_types.append(Pretend)


def to_pretend(x):
    """A CPU tensor as a tensor on the device; other objects unchanged."""
    if not isinstance(x, torch.Tensor) or isinstance(x, Pretend):
        return x
    if not torch.is_inference_mode_enabled():
        return Pretend(x.detach())
    with torch.inference_mode(False):  # a view of a tensor with a version must also have one
        return Pretend(x)


def _inner(x):
    return x.inner if isinstance(x, Pretend) else x


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Recorder:
    """Counts of events, with the lines that caused them."""

    current = None

    def __init__(self):
        self.syncs = Counter()  # (kind, line): the host waits for the device
        self.uploads = Counter()  # line: from the host to the device
        self.launches = Counter()  # operator: lower limit of the number of kernels
        self.host = Counter()  # (operator, line): computed on the CPU
        self.host_elements = Counter()  # line: the largest CPU tensor there
        self.double_products = Counter()  # line: products in float64, 64 times as slow on many GPUs
        self.doubles = Counter()  # line: float64 tensors that were made
        self.attention = Counter()  # kernel that CUDA would choose

    def sync_count(self):
        """Number of synchronisations."""
        return self.syncs.total()


def where():
    """The innermost line of this project, of SpeechBrain or of an optimizer, and the project's line that called it."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        name, line = frame.f_code.co_filename, f"{frame.f_code.co_filename}:{frame.f_lineno}"
        for part in ("/speechbrain_ext/", "/recipes/", "/train.py"):
            if part in name:
                return " < ".join([*found, line[line.rindex(part) + 1 :]])
        for part in ("/speechbrain/", "/torch/optim/"):
            if part in name and not found:
                found.append(line[line.rindex(part) + 1 :])
        frame = frame.f_back
    return " < ".join(found) or "backward or a test"


def _run(func, args, kwargs, recorder, mode=None):
    name = func._schema.name
    if torch.is_inference_mode_enabled() and func._can_decompose():  # in inference mode composed operators are not decomposed
        with mode or contextlib.nullcontext():
            return func.decompose(*args, **kwargs)
    tensors = _tensors((args, kwargs))
    pretend = [x for x in tensors if isinstance(x, Pretend)]
    plain = [x for x in tensors if not isinstance(x, Pretend)]
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if name == "prim::device":
        return DEVICE if pretend else CPU
    if name in COPIES:
        return _copy(func, name, args, kwargs, device, recorder)
    on_device = bool(pretend) if device is None else device.type == NAME
    if not pretend and not on_device:
        if recorder is not None and name not in QUIET and plain:
            line = where()
            recorder.host[name, line] += 1
            recorder.host_elements[line] = max(recorder.host_elements[line], *(x.numel() for x in plain))
        return func(*args, **kwargs)
    if pretend and plain:
        _refuse_mixed(func, name, args, plain, recorder)
    if recorder is not None:
        _record(func, name, args, pretend, recorder)
    kwargs = kwargs | ({} if device is None else {"device": CPU}) | ({"pin_memory": False} if "pin_memory" in kwargs else {})
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    out = ATTENTION.get(name, func)(*inner_args, **inner_kwargs)
    if name in ("aten::_local_scalar_dense", "aten::equal") or not on_device:
        return out
    out = tree_map(to_pretend, out)
    if recorder is not None and any(x.dtype == torch.float64 for x in _tensors(out)):
        recorder.doubles[where()] += 1
    if not pretend:
        return out
    if torch.is_inference_mode_enabled():  # tensors have no versions in inference mode
        written = [i for i, x in enumerate(func._schema.arguments) if x.alias_info is not None and x.alias_info.is_write]
        return args[written[0]] if written and written[0] < len(args) else out
    return return_and_correct_aliasing(func, args, kwargs, out)


def _refuse_mixed(func, name, args, plain, recorder):
    """CUDA accepts single numbers, lengths of CTC and indices from the CPU; indices are uploaded."""
    allowed = _tensors(args[1]) if name in INDEXING else [args[place] for place in CTC.get(name, ())]
    if recorder is not None and name in INDEXING and any(not isinstance(x, Pretend) for x in allowed):
        recorder.uploads[f"index on the CPU, {where()}"] += 1
    for x in plain:
        if x.dim() and not any(x is other for other in allowed):
            raise DeviceMixError(f"{func}: a CPU tensor of shape {tuple(x.shape)} meets tensors of {DEVICE}, at {where()}")


def _record(func, name, args, pretend, recorder):
    if name in SYNCS:
        recorder.syncs[SYNCS[name], where()] += 1
    if any(isinstance(args[place], Pretend) for place in CTC.get(name, ())):
        recorder.syncs["CTC with lengths on the device", where()] += 1
    if name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1])):
        recorder.syncs["indexing with a boolean mask", where()] += 1
    if name in PRODUCTS and pretend[0].dtype == torch.float64:
        recorder.double_products[where()] += 1
    is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
    if name not in QUIET and name not in ALLOCATIONS and not is_view:
        recorder.launches[name] += 1


def _copy(func, name, args, kwargs, device, recorder):
    source, target = (args[0], device or args[0].device) if name == "aten::_to_copy" else (args[1], args[0].device)
    from_device, to_device = isinstance(source, Pretend), target.type == NAME
    if recorder is not None:
        if from_device and not to_device:
            recorder.syncs[f"copy to the CPU of {tuple(source.shape)}", where()] += 1
        elif to_device and not from_device and (name == "aten::_to_copy" or source.dim()):
            recorder.uploads[where()] += 1
        elif to_device:
            recorder.launches[name] += 1
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if name == "aten::_to_copy":
        inner_kwargs = {key: x for key, x in inner_kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
        out = func(*inner_args, **inner_kwargs)
        if recorder is not None and to_device and out.dtype == torch.float64:
            recorder.doubles[where()] += 1
        return to_pretend(out) if to_device else out
    func(*inner_args, **{key: x for key, x in inner_kwargs.items() if key != "non_blocking"})
    return args[0]


# ------------------------------------------------------------------ attention as on CUDA


def attention_kernel(query, value, bias):
    """The kernel of ``scaled_dot_product_attention`` that CUDA uses on Ampere or newer, by the rules of torch 2.11's
    ``sdp_utils.cpp``: "flash" and "efficient" are fused, "math" computes all scores."""
    half, size = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    if half and bias is None and size <= 256:
        return "flash"
    fits = size % (8 if half else 4) == 0 and value.shape[-1] % (8 if half else 4) == 0
    return "efficient" if fits and query.dtype != torch.float64 else "math"


def _scores(query, key, bias, scale):
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores if bias is None else scores + bias


def _efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    scores, seed = _scores(query, key, attn_bias, scale), torch.zeros((), dtype=torch.int64)
    return scores.softmax(-1) @ value, scores.logsumexp(-1), seed, seed


def _efficient_backward(
    grad, query, key, value, attn_bias, out, lse, seed, offset, dropout_p, wanted, is_causal=False, *, scale=None
):
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    probabilities = _scores(query, key, attn_bias, scale).softmax(-1)
    inner = grad @ value.transpose(-1, -2)
    scores = probabilities * (inner - (inner * probabilities).sum(-1, keepdim=True))
    grads = scores @ key * factor, scores.transpose(-1, -2) @ query * factor, probabilities.transpose(-1, -2) @ grad, scores
    return tuple(grad if want else torch.zeros(0) for grad, want in zip(grads, wanted, strict=True))


ATTENTION = {
    "aten::_scaled_dot_product_efficient_attention": _efficient,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}


def _cuda_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """``F.scaled_dot_product_attention`` chooses by the device in C++. This is its choice on CUDA."""
    if not isinstance(query, Pretend):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    kernel = attention_kernel(query, value, attn_mask)
    copied = attn_mask is not None and (attn_mask.stride(-1) != 1 or any(stride % 8 for stride in attn_mask.stride()[:-1]))
    if Recorder.current is not None:
        Recorder.current.attention[f"{kernel}, bias copied" if kernel == "efficient" and copied else kernel] += 1
    if kernel == "math":
        return _attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
    if copied:
        keys = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, 8 - keys % 8))[..., :keys]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, attn_mask))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, needed, dropout_p, is_causal, scale=scale)[0]


_attention = F.scaled_dot_product_attention


class PretendGpu(TorchDispatchMode):
    """Context in which tensors can be made on ``DEVICE`` and moved there. Its variable is a Recorder."""

    def __init__(self):
        super().__init__()
        self.recorder = Recorder()

    def __enter__(self):
        self._before = Recorder.current, torch._C._only_lift_cpu_tensors(), F.scaled_dot_product_attention
        Recorder.current = self.recorder
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE): made on the CPU, then copied
        F.scaled_dot_product_attention = _cuda_attention
        super().__enter__()
        return self.recorder

    def __exit__(self, *exception):
        Recorder.current, lift, F.scaled_dot_product_attention = self._before
        torch._C._set_only_lift_cpu_tensors(lift)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.recorder, self)

    @contextlib.contextmanager
    def recorded(self):
        """Inner context with a separate Recorder as its variable."""
        before, self.recorder = self.recorder, Recorder()
        Recorder.current = self.recorder
        try:
            yield self.recorder
        finally:
            self.recorder = Recorder.current = before


def load_there(monkeypatch):
    """Let ``torch.load`` put tensors on ``DEVICE`` if ``map_location`` names it."""

    def load(*args, map_location=None, original=torch.load, **keys):
        loaded = original(*args, map_location="cpu", **keys)
        return tree_map(to_pretend, loaded) if str(map_location).startswith(NAME) else loaded

    monkeypatch.setattr(torch, "load", load)
