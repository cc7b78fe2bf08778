"""Keys and values of SpeechBrain's Transformer decoder, kept from step to step of a search.

SpeechBrain decodes the whole prefix again for every new token. But the output of a layer at a position does not depend on later
tokens. A step therefore needs only the new position, and the keys and values of the positions before it. Each hypothesis has its
own; all hypotheses of an utterance share the keys and values of the encoder frames, and are queries of one attention over them.
"""

import torch
import torch.nn.functional as F


class _Cache:
    """Keys and values of the positions so far. Hypotheses continue earlier hypotheses."""

    def __init__(self, layers, hypotheses, like):
        self.length = 0
        """Number of positions so far."""
        # Positions first: the positions so far are one block, which one copy reorders
        self._past = self._spare = like.new_empty(0, 2 * layers, hypotheses, like.shape[-1])
        self._order = None

    def reorder(self, index):
        """Continue with other hypotheses.

        Arguments
        ---------
        index : torch.Tensor
            (B * K,) for each new hypothesis, the index of the one that it continues, of the same utterance.
        """
        self._order = index if self._order is None else self._order[index]

    def _make_room(self, x):
        """Make room for one more position, and bring the positions so far into their new order."""
        length = self.length
        if self._order is None and length < len(self._past):
            return
        if length >= len(self._spare):
            self._spare = x.new_empty(max(32, 2 * length), *self._past.shape[1:])
        if self._order is None:
            self._spare[:length] = self._past[:length]
        else:
            torch.index_select(self._past[:length], 2, self._order, out=self._spare[:length])
        self._past, self._spare = self._spare, self._past
        self._order = None

    def _attend_past(self, i, attention, x):
        heads = x.shape[0] * x.shape[1] * attention.num_heads  # of all hypotheses
        query, key, value = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        self._past[self.length, 2 * i] = key.flatten(0, 1)
        self._past[self.length, 2 * i + 1] = value.flatten(0, 1)
        past = self._past[: self.length + 1]
        keys, values = (past[:, j].view(len(past), heads, -1) for j in (2 * i, 2 * i + 1))  # (U, B*K*H, D/H)
        query = query.reshape(heads, 1, -1) * keys.shape[-1] ** -0.5
        weights = torch.bmm(query, keys.permute(1, 2, 0)).softmax(-1)  # (B*K*H, 1, U)
        return attention.out_proj(torch.bmm(weights, values.transpose(0, 1)).view_as(x))


class DecoderCache(_Cache):
    """Runs a decoder one position at a time. The output is that of the decoder for the whole prefix.

    Arguments
    ---------
    decoder : speechbrain.lobes.models.transformer.Transformer.TransformerDecoder
        The decoder, in evaluation mode. Its weights do not change, and nothing has a gradient.
    encoder_out : torch.Tensor
        (B, T, D).
    memory_mask : torch.Tensor, optional
        (B, T) bool, True = not attended. Each utterance needs at least one attended frame.
    beam_size : int
        Number of hypotheses K per utterance.

    Example
    -------
    >>> from speechbrain.lobes.models.transformer.Transformer import TransformerDecoder
    >>> decoder = TransformerDecoder(num_layers=2, nhead=4, d_ffn=64, d_model=32).eval()
    >>> cache = DecoderCache(decoder, torch.rand(3, 20, 32), beam_size=5)
    >>> out, attention = cache.step(torch.rand(15, 32))
    >>> cache.reorder(torch.tensor([0, 0, 1, 1, 2, 5, 5, 5, 6, 7, 10, 11, 12, 13, 14]))  # hypothesis 0 continues twice
    >>> out, attention = cache.step(torch.rand(15, 32))
    >>> out.shape, attention.shape
    (torch.Size([15, 32]), torch.Size([15, 20]))
    """

    @torch.no_grad()
    def __init__(self, decoder, encoder_out, memory_mask=None, beam_size=1):
        self.decoder = decoder
        self.beam_size = beam_size
        self.blocked = None if memory_mask is None else memory_mask[:, None, None]  # (B, 1, 1, T)
        self.memory = []  # per layer, keys (B, H, D/H, T) and values (B, H, T, D/H)
        for layer in decoder.layers:
            attention = layer.multihead_attn.att
            d_model, heads = attention.embed_dim, attention.num_heads
            projected = F.linear(encoder_out, attention.in_proj_weight[d_model:], attention.in_proj_bias[d_model:])
            keys, values = projected.unflatten(2, (2, heads, -1)).unbind(2)
            self.memory.append((keys.permute(0, 2, 3, 1).contiguous(), values.transpose(1, 2).contiguous()))
        super().__init__(len(decoder.layers), len(encoder_out) * beam_size, encoder_out)

    @torch.no_grad()
    def step(self, x):
        """Decode the next position.

        Arguments
        ---------
        x : torch.Tensor
            (B * K, D) embedded tokens with their positional encoding.

        Returns
        -------
        tuple
            Decoder output (B * K, D), and the last layer's attention on the encoder frames (B * K, T), the mean over heads.
        """
        self._make_room(x)
        x = x.unflatten(0, (-1, self.beam_size))  # (B, K, D)
        for i, layer in enumerate(self.decoder.layers):
            before = layer.normalize_before
            y = layer.norm1(x) if before else x
            x = x + self._attend_past(i, layer.self_attn.att, y)
            x = x if before else layer.norm1(x)
            y = layer.norm2(x) if before else x
            y, weights = self._attend_memory(i, layer.multihead_attn.att, y)
            x = x + y
            x = x if before else layer.norm2(x)
            y = layer.norm3(x) if before else x
            x = x + layer.pos_ffn(y)
            x = x if before else layer.norm3(x)
        self.length += 1
        return self.decoder.norm(x).flatten(0, 1), weights.mean(1).flatten(0, 1)

    def _attend_memory(self, i, attention, x):
        d_model, heads = attention.embed_dim, attention.num_heads
        keys, values = self.memory[i]
        query = F.linear(x, attention.in_proj_weight[:d_model], attention.in_proj_bias[:d_model])
        query = query.unflatten(2, (heads, -1)).transpose(1, 2) * keys.shape[2] ** -0.5  # (B, H, K, D/H)
        scores = query @ keys
        if self.blocked is not None:
            scores = scores.masked_fill(self.blocked, -torch.inf)
        weights = scores.softmax(-1)  # (B, H, K, T)
        return attention.out_proj((weights @ values).transpose(1, 2).flatten(2)), weights


class EncoderCache(_Cache):
    """Runs the causal encoder of a language model one position at a time.

    Arguments
    ---------
    encoder : speechbrain.lobes.models.transformer.Transformer.TransformerEncoder
        The encoder with plain attention, in evaluation mode. Nothing has a gradient.
    hypotheses : int
        Number of hypotheses N.
    like : torch.Tensor
        (..., D) with the type and device of the input of :meth:`step`.

    Example
    -------
    >>> from speechbrain.lobes.models.transformer.Transformer import TransformerEncoder, get_lookahead_mask
    >>> encoder, x = TransformerEncoder(num_layers=2, nhead=4, d_ffn=64, d_model=32).eval(), torch.rand(3, 5, 32)
    >>> cache = EncoderCache(encoder, 3, x)
    >>> for position in x.unbind(1):
    ...     out = cache.step(position)
    >>> torch.allclose(out, encoder(x, get_lookahead_mask(x))[0][:, -1], atol=1e-5)
    True
    """

    def __init__(self, encoder, hypotheses, like):
        super().__init__(len(encoder.layers), hypotheses, like)
        self.encoder = encoder

    @torch.no_grad()
    def step(self, x):
        """Encode the next position (N, D)."""
        self._make_room(x)
        x = x.unsqueeze(1)
        for i, layer in enumerate(self.encoder.layers):
            before = layer.normalize_before
            x = x + self._attend_past(i, layer.self_att.att, layer.norm1(x) if before else x)
            x = x if before else layer.norm1(x)
            x = x + layer.pos_ffn(layer.norm2(x) if before else x)
            x = x if before else layer.norm2(x)
        self.length += 1
        return self.encoder.norm(x).squeeze(1)
