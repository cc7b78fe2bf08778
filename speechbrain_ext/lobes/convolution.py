"""Convolution modules of the Conformer and of the Squeezeformer, padding-exact, chunked and streaming."""

import torch
import torch.nn.functional as F
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import library, nn

from speechbrain_ext.lobes.activations import Swish
from speechbrain_ext.lobes.dropout import Dropout
from speechbrain_ext.lobes.fusible import MaskedBatchNorm, ScaledLinear, Unchanged
from speechbrain_ext.lobes.masks import chunk_length, zero_padding
from speechbrain_ext.lobes.precision import at_least_float32, autocasts, full_precision
from speechbrain_ext.utils.errors import UserError, is_whole

SMALL = 2**16
"""With fewer products than this, a depthwise convolution on a CPU is faster as one multiplication and one sum: half the time at a
quarter of this number (144 channels, kernel 15, 8 frames), the same time at twice this number (torch 2.11, AVX-512)."""


def channels_last_conv(x, weight, bias=None, stride: int = 1, padding=(0, 0), groups: int = 1):
    """Convolution over time and bins of channels-last tensors, the layout of the CPU's fast kernels.

    Arguments
    ---------
    x : torch.Tensor
        (B, T, F, C).
    weight : torch.Tensor
        (C', C / ``groups``, K, L), as of ``nn.Conv2d``.
    bias : torch.Tensor, optional
        (C',).
    stride : int
        Over time and over bins.
    padding : sequence of int
        Zeros on either side of time, and on either side of the bins.
    groups : int
        With more than one group, a CPU computes in float32 or better.

    Returns
    -------
    torch.Tensor
        (B, T', F', C'). The type is that of autocast where it is on; with more than one group on a CPU it is that of ``x``.

    Example
    -------
    >>> channels_last_conv(torch.ones(1, 7, 5, 2), torch.ones(3, 2, 3, 3), stride=2).shape
    torch.Size([1, 3, 2, 3])
    """
    tensors, dtype, device = (x, weight, bias), x.dtype, x.device.type
    if device == "cpu" and groups > 1:
        # In bfloat16 the kernel never returns for some shapes (32 channels, K = 31, batch 3; oneDNN of torch 2.11).
        tensors = [tensor if tensor is None else at_least_float32(tensor) for tensor in tensors]
    elif autocasts(x):
        dtype = torch.get_autocast_dtype(device)
        tensors = [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]
    # If torch.compile sees a convolution on a CPU, it changes the layout of all four-dimensional tensors around it, also those of
    # attention. That is slower, and it fails in training with free lengths (inductor of torch 2.11).
    compiled = device == "cpu" and torch.compiler.is_dynamo_compiling()
    return (_opaque_conv if compiled else _conv)(*tensors, [stride] * 2, list(padding), groups).to(dtype)


def _conv(x, weight, bias, stride, padding, groups):
    x = x.permute(0, 3, 1, 2)
    if groups > 1 and x.is_cuda:
        x = x.contiguous()  # PyTorch's own kernel; channels last would take cuDNN's, which makes a plan for each new length
    with full_precision(x):
        return F.conv2d(x, weight, bias, stride, padding, groups=groups).permute(0, 2, 3, 1)


@library.custom_op("speechbrain_ext::conv", mutates_args=())
def _opaque_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    groups: int,
) -> torch.Tensor:
    return _conv(x, weight, bias, stride, padding, groups).contiguous()


@_opaque_conv.register_fake
def _(x, weight, bias, stride, padding, groups):
    frames, bins = ((x.shape[i + 1] + 2 * padding[i] - weight.shape[i + 2]) // stride[i] + 1 for i in range(2))
    return x.new_empty(x.shape[0], frames, bins, weight.shape[0])  # len(x) would fix the batch size of the graph


@library.custom_op("speechbrain_ext::conv_backward", mutates_args=())
def _opaque_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    groups: int,
    wanted: list[bool],
) -> list[torch.Tensor]:
    """The wanted gradients of input, weight and bias."""
    grad, x = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    keys = [weight.shape[0]], stride, padding, [1, 1], False, [0, 0], groups, wanted
    x, weight, bias = torch.ops.aten.convolution_backward(grad, x, weight, *keys)
    x = None if x is None else x.permute(0, 2, 3, 1)
    return [gradient.contiguous() for gradient in (x, weight, bias) if gradient is not None]


@_opaque_conv_backward.register_fake
def _(grad, x, weight, stride, padding, groups, wanted):
    shapes = x.shape, weight.shape, weight.shape[:1]
    return [grad.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _setup_context(ctx, inputs, output):
    x, weight, _, *ctx.keys = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    wanted = list(ctx.needs_input_grad[:3])
    gradients = iter(_opaque_conv_backward(grad, *ctx.saved_tensors, *ctx.keys, wanted))
    return *(next(gradients) if want else None for want in wanted), None, None, None


_opaque_conv.register_autograd(_backward, setup_context=_setup_context)


def depthwise_conv(x, weight, bias=None, stride: int = 1, padding: int = 0):
    """Depthwise convolution over time.

    Arguments
    ---------
    x : torch.Tensor
        (B, T, D).
    weight : torch.Tensor
        (D, 1, K), as of ``nn.Conv1d(D, D, K, groups=D)``.
    bias : torch.Tensor, optional
        (D,).
    stride : int
        Frames from one output to the next.
    padding : int
        Zeros on either side. Padding before the call makes a copy, which takes a third of the time at 2000 frames.

    Returns
    -------
    torch.Tensor
        (B, floor((T + 2 padding - K) / stride) + 1, D).

    Example
    -------
    >>> depthwise_conv(torch.ones(1, 5, 2), torch.ones(2, 1, 3)).shape
    torch.Size([1, 3, 2])
    """
    if x.device.type != "cpu":
        return F.conv1d(x.transpose(1, 2), weight, bias, stride, padding, groups=weight.shape[0]).transpose(1, 2)
    # Time takes the place of bins, and there is one frame: Conv1d takes 12 to 15 times as long for K = 31.
    return channels_last_conv(x.unsqueeze(1), weight.unsqueeze(2), bias, stride, (0, padding), weight.shape[0]).squeeze(1)


class DepthwiseModule(nn.Module):
    """Base of convolution modules: a depthwise convolution over time, for whole utterances, in chunks and streaming.

    Padded frames are zeroed just before the depthwise convolution. Before that, biases would fill them again; after it, they
    would have reached their neighbours.

    With a chunk setting the convolution is a Dynamic Chunk Convolution (Li et al. 2023,
    https://arxiv.org/abs/2304.09325): it sees (K - 1) / 2 frames to the left across chunks and nothing to the right of its chunk.
    The streaming state is the last (K - 1) / 2 inputs of the depthwise convolution. A causal convolution sees K - 1 frames to the
    left and none to the right, with any chunks; its state is twice as long.

    Subclasses define ``_before(x, mask)``, ``_after(x, mask)``, the convolution ``depthwise`` between the two, and
    ``depthwise_norm``, which normalises its output.

    Arguments
    ---------
    kernel_size : int
        Odd kernel size K of the depthwise convolution, in frames.
    causal : bool
        Whether the convolution sees nothing to the right.

    Raises
    ------
    ValueError
        If the kernel size is not positive and odd.
    """

    def __init__(self, kernel_size: int, causal: bool = False):
        super().__init__()
        if not is_whole(kernel_size, 1) or kernel_size % 2 == 0:
            raise UserError(f"The kernel size of the depthwise convolution must be positive and odd, not {kernel_size!r}.")
        self.look_ahead = 0 if causal else kernel_size // 2
        self.context = kernel_size - 1 - self.look_ahead

    @property
    def branch_end(self) -> nn.Module:
        """The last layer with weights."""
        return self.pointwise2

    def forward(self, x, mask=None, config: DynChunkTrainConfig | None = None):
        """Convolve a whole utterance.

        Arguments
        ---------
        x : torch.Tensor
            (B, T, D).
        mask : torch.Tensor, optional
            (B, T) bool, True = padding.
        config : DynChunkTrainConfig, optional
            The chunk setting.

        Returns
        -------
        torch.Tensor
            (B, T, D).
        """
        x = zero_padding(self._before(x, mask), mask)
        if not self.look_ahead:
            return self._after(self._convolve(F.pad(x, (0, 0, self.context, 0))), mask)
        if config is None:
            return self._after(self._convolve(x, self.look_ahead), mask)
        batch, frames, width = x.shape
        size = chunk_length(config, frames)
        fill = -frames % size
        # For chunks a, b, c of 4 frames and 2 frames of context: 00aaaa00, aabbbb00, bbcccc00.
        x = F.pad(x, (0, 0, self.context, fill)).unfold(1, size + self.context, size)  # (B, chunks, D, context + size)
        if x.device.type == "cpu":
            x = F.pad(x.transpose(2, 3).flatten(0, 1), (0, 0, 0, self.look_ahead))
        else:  # other devices' kernels need time last, as in the view
            x = F.pad(x, (0, self.look_ahead)).flatten(0, 1).transpose(1, 2)
        return self._after(self._convolve(x).reshape(batch, frames + fill, width)[:, :frames], mask)

    def stream(self, x, state):
        """Convolve one chunk.

        Arguments
        ---------
        x : torch.Tensor
            (B, C, D).
        state : torch.Tensor, optional
            (B, left context, width of the depthwise convolution) from the last call, None before the first chunk.

        Returns
        -------
        tuple
            Output (B, C, D) and the new state.
        """
        x = self._before(x, None)
        x = F.pad(x, (0, 0, self.context, 0)) if state is None else torch.cat((state, x), dim=1)
        y = self._after(self._convolve_few(F.pad(x, (0, 0, 0, self.look_ahead))), None)
        return y, x[:, x.shape[1] - self.context :].clone()

    def fuse_(self):
        """Fold a BatchNorm after the depthwise convolution into its weights, in place."""
        if isinstance(self.depthwise_norm, MaskedBatchNorm):
            self.depthwise_norm.fold_into_(self.depthwise)
            self.depthwise_norm = Unchanged()

    def _convolve(self, x, padding: int = 0):
        return depthwise_conv(x, self.depthwise.weight, self.depthwise.bias, padding=padding)

    def _convolve_few(self, x):
        """Convolve the few frames of a chunk: as a product and a sum if the call of a convolution costs more than its work."""
        if torch.compiler.is_exporting():  # in a graph for any batch the number of products is unknown
            return self._convolve(x)
        windows = x.unfold(1, self.depthwise.weight.shape[2], 1).transpose(2, 3)  # (B, C, K, D)
        if x.device.type != "cpu" or windows.numel() > SMALL:
            return self._convolve(x)
        with full_precision(x):
            y = (at_least_float32(windows) * at_least_float32(self.depthwise.weight)[:, 0].t()).sum(2)
            return (y if self.depthwise.bias is None else y + at_least_float32(self.depthwise.bias)).to(x.dtype)


class ConvolutionModule(DepthwiseModule):
    """The Conformer's module: LayerNorm, pointwise, GLU, depthwise, LayerNorm, Swish, pointwise, dropout; without the residual.

    See :class:`DepthwiseModule` for padding, chunks and streaming.

    Arguments
    ---------
    d_model : int
        Width D.
    kernel_size : int
        Odd kernel size K of the depthwise convolution, in frames.
    dropout : float
        Dropout on the output.
    activation : type
        Class of the activation after the depthwise convolution.
    bias : bool
        Whether the linear and convolution layers have a bias.
    causal : bool
        Whether the convolution sees nothing to the right.

    Raises
    ------
    ValueError
        If the kernel size is not positive and odd.

    Example
    -------
    >>> ConvolutionModule(16, 7)(torch.rand(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        d_model: int,
        kernel_size: int = 31,
        dropout: float = 0.0,
        activation: type = Swish,
        bias: bool = True,
        causal: bool = False,
    ):
        super().__init__(kernel_size, causal)
        self.norm = nn.LayerNorm(d_model)
        self.pointwise1 = nn.Linear(d_model, 2 * d_model, bias=bias)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model, bias=bias)
        self.depthwise_norm = nn.LayerNorm(d_model)
        self.activation = activation()
        self.pointwise2 = nn.Linear(d_model, d_model, bias=bias)
        self.dropout = Dropout(dropout)

    def _before(self, x, mask):
        return F.glu(self.pointwise1(self.norm(x)), dim=-1)

    def _after(self, x, mask):
        return self.dropout(self.pointwise2(self.activation(self.depthwise_norm(x))))


class SwishConvolutionModule(DepthwiseModule):
    """The Squeezeformer's module: scale, pointwise, Swish, depthwise, BatchNorm, Swish, pointwise, dropout; without the residual.

    Swish replaces the Conformer's GLU; the depthwise convolution therefore has width 2 D. Padding never enters the statistics of
    the BatchNorm.

    Source: Kim et al. 2022, https://arxiv.org/abs/2206.00888, section 3.2.1; the authors' code for details that it leaves open.

    Arguments
    ---------
    d_model : int
        Width D.
    kernel_size : int
        Odd kernel size of the depthwise convolution, in frames.
    dropout : float
        Dropout on the output.
    eps : float
        Epsilon of the BatchNorm.

    Raises
    ------
    ValueError
        If the kernel size is not positive and odd.

    Example
    -------
    >>> SwishConvolutionModule(16, 7)(torch.rand(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, d_model: int, kernel_size: int = 31, dropout: float = 0.0, eps: float = 1e-5):
        super().__init__(kernel_size)
        self.pointwise1 = ScaledLinear(d_model, 2 * d_model)
        self.depthwise = nn.Conv1d(2 * d_model, 2 * d_model, kernel_size, groups=2 * d_model)
        self.depthwise_norm = MaskedBatchNorm(2 * d_model, momentum=0.015, eps=eps)  # the authors' momentum
        self.activation = Swish()
        self.pointwise2 = nn.Linear(2 * d_model, d_model)
        self.dropout = Dropout(dropout)
        nn.init.uniform_(self.pointwise2.weight, -(d_model**-0.5), d_model**-0.5)  # the authors' range
        nn.init.uniform_(self.pointwise2.bias, -(d_model**-0.5), d_model**-0.5)

    def _before(self, x, mask):
        return self.activation(self.pointwise1(x))

    def _after(self, x, mask):
        return self.dropout(self.pointwise2(self.activation(self.depthwise_norm(x, mask))))
