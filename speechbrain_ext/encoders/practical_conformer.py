"""Practical Conformer (Botros et al. 2023, https://arxiv.org/abs/2304.00171): a small causal Conformer with little state.

We worked from the paper's abstract. Its ideas here: the lower blocks mix by convolution alone; the model is small; the upper
blocks have Performer attention in recurrent form instead of softmax attention ("RNNAttention-Performer").

These decisions are ours:

* a third of the blocks mix by convolution alone;
* every number in :data:`SIZES`, and a kernel of 15;
* ReLU features without random projection, trained from the start; the paper may fine-tune a model trained with softmax attention;
* no positions in attention, as the convolutions give order;
* LayerNorm in the convolution module;
* no decay of the running sums.
"""

from dataclasses import dataclass

from torch import nn

from speechbrain_ext.encoders._base import Encoder, choose_size
from speechbrain_ext.encoders.conformer import ConformerLayer
from speechbrain_ext.lobes.attention import ATTENTIONS, build_attention
from speechbrain_ext.lobes.performer import PerformerAttention
from speechbrain_ext.lobes.stack import Stack
from speechbrain_ext.registry import register_encoder
from speechbrain_ext.utils.errors import UserError, is_whole


@dataclass(frozen=True)
class Size:
    """One row of the table of sizes."""

    d_model: int
    nhead: int
    num_layers: int
    d_ffn: int

    @property
    def cascade_layers(self) -> int:
        """Number of blocks of a cascade with ``num_layers`` blocks in its first stage."""
        return self.num_layers * 3 // 2


SIZES = {
    "xs": Size(96, 4, 8, 288),
    "s": Size(144, 4, 10, 432),
    "m": Size(256, 4, 12, 768),
    "l": Size(512, 8, 14, 1536),
}
"""Our sizes: 1.4, 3.8, 14.0 and 65.8 M parameters. A Conformer of 17 blocks, d_model 512 and d_ffn 2048 has 107 M."""


@register_encoder("practical_conformer")
class PracticalConformerEncoder(Encoder):
    """Practical Conformer encoder.

    Time is linear in length. The streaming state does not grow with the stream: K - 1 frames (causal) per block, and
    nhead m (d / nhead + 1) float64 numbers per block with Performer attention, see :mod:`speechbrain_ext.lobes.performer`.

    Arguments
    ---------
    d_model : int, optional
        Width. The default of it and of the next three is that of the size; without a size that of "s".
    nhead : int, optional
        Number of attention heads.
    num_layers : int, optional
        Number of blocks.
    d_ffn : int, optional
        Width of the feed-forward modules' hidden layer.
    dropout : float
        Dropout everywhere.
    size : str, optional
        One of :data:`SIZES`.
    convolution_layers : int, optional
        Number of lower blocks that mix by convolution alone; by default a third.
    kernel_size : int
        Kernel of the depthwise convolutions, in frames.
    attention_type : str
        Attention of the upper blocks: "Performer", or "RoPEMHA" or "RelPosMHAXL" for softmax attention.
    kernel, features : str, int
        Keys of the Performer, see :class:`speechbrain_ext.lobes.performer.PerformerAttention`.
    causal : bool
        Whether a frame sees no later frame. With unlimited left context chunks then change nothing: streaming in chunks of any
        size gives the frames of the whole utterance. If False, a frame sees the full context, or all of its chunk.

    Raises
    ------
    ValueError
        If a size is impossible, unknown, or contradicts the other keys, or the attention type is unknown.

    Example
    -------
    >>> import torch
    >>> encoder = PracticalConformerEncoder(size="xs").eval()
    >>> x = torch.rand(1, 50, 96)
    >>> out, _ = encoder(x)
    >>> torch.allclose(encoder(x[:, :20])[0], out[:, :20], atol=1e-5)  # causal
    True
    """

    sizes = SIZES

    def __init__(
        self,
        d_model: int | None = None,
        nhead: int | None = None,
        num_layers: int | None = None,
        d_ffn: int | None = None,
        dropout: float = 0.1,
        size: str | None = None,
        convolution_layers: int | None = None,
        kernel_size: int = 15,
        attention_type: str = "Performer",
        kernel: str = "relu",
        features: int | None = None,
        causal: bool = True,
    ):
        given = {"d_model": d_model, "nhead": nhead, "num_layers": num_layers, "d_ffn": d_ffn}
        d_model, nhead, num_layers, d_ffn = choose_size("Practical Conformer", SIZES, size, "s", given)
        if convolution_layers is None:
            convolution_layers = num_layers // 3
        if not is_whole(convolution_layers, 0, num_layers):
            raise UserError(f"convolution_layers is {convolution_layers!r}; give 0 to num_layers ({num_layers}).")
        known = ("Performer", *ATTENTIONS)
        if attention_type not in known:
            raise UserError(f"Unknown attention_type '{attention_type}'; the known ones are: {', '.join(known)}.")

        def mixer():
            if attention_type == "Performer":
                return PerformerAttention(d_model, nhead, dropout, kernel, features, causal)
            return build_attention(attention_type, d_model, nhead, dropout, causal=causal)

        super().__init__(
            d_model,
            Stack(
                ConformerLayer(
                    mixer() if index >= convolution_layers else None, d_model, d_ffn, dropout, kernel_size, causal=causal
                )
                for index in range(num_layers)
            ),
        )
        self.norm = nn.LayerNorm(d_model, eps=1e-6)

    def after_layers(self, x, mask=None):
        """LayerNorm."""
        return self.norm(x)
