"""The compared models: every registered encoder, and encoders of other packages (peers), at equal work.

Equal work: all models get the same frames, and have the same number of blocks, width, heads, feed-forward width and kernel.
Batches are padded and have a mask, as in training; a single utterance has neither. With front end, all models get the same
features. Our encoders use :class:`speechbrain_ext.lobes.subsampling.ConvolutionSubsampling`. Peers use SpeechBrain's
``ConvolutionFrontEnd`` with the settings of its published recipes, which has the same parameters. A linear layer of the encoder's
width follows.

If a peer and one of our encoders compute the same, both have the same weights, and :func:`assert_equal` compares their outputs.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.lobes.models.transformer.Branchformer import BranchformerEncoder
from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder
from speechbrain.lobes.models.transformer.Transformer import PositionalEncoding
from speechbrain.nnet.attention import RelPosEncXL
from torch import nn

from speechbrain_ext.convert import convert_speechbrain
from speechbrain_ext.encoders import StreamingContext
from speechbrain_ext.lobes.fusible import ScaledLinear
from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask
from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling
from speechbrain_ext.registry import build_encoder, encoder_keys, encoder_sizes, get_encoder
from speechbrain_ext.utils.errors import one_line

BASELINE = "conformer"
FEATURES = 80
CHANNELS = (64, 32)  # channels of the front end, as in SpeechBrain's published recipes
TOLERANCE = 1e-4


class EqualityError(RuntimeError):
    """Two models that should compute the same do not."""


class Unsupported(RuntimeError):
    """A model cannot do the task; the message becomes the note in its row."""


@dataclass(frozen=True)
class Dimensions:
    """Dimensions that all encoders of a comparison share."""

    d_model: int = 144
    nhead: int = 8
    num_layers: int = 10
    d_ffn: int = 576
    kernel_size: int = 31
    dropout: float = 0.1

    def __str__(self):
        return f"{self.d_model} x {self.num_layers}, {self.nhead} heads, ffn {self.d_ffn}, kernel {self.kernel_size}"


class Model(nn.Module):
    """One of our encoders, or one with the same interface, as the module that is measured: (B, T, D) to (B, T, D)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, mask=None):
        """Encode whole utterances; the mask is (B, T) bool, True = padding."""
        return self.encoder(x, src_key_padding_mask=mask)[0]

    def make_context(self, config):
        """The context of a new stream."""
        if not getattr(self.encoder, "streamable", False):
            raise Unsupported("does not stream")
        try:
            return self.encoder.make_streaming_context(config)
        except ValueError as error:
            raise Unsupported(str(error)) from error

    def stream(self, x, context):
        """Encode one chunk (B, C, D)."""
        return self.encoder.forward_streaming(x, context)[0]

    def state_bytes(self, context):
        """Size of all tensors that a stream keeps."""
        return StreamingContext(None, context.layers).state_bytes()


class SpeechBrainModel(Model):
    """SpeechBrain's encoders, with the position table that SpeechBrain's TransformerASR computes in each call."""

    def __init__(self, encoder, d_model, relative):
        super().__init__(encoder)
        self.positions = RelPosEncXL(d_model) if relative else None

    def forward(self, x, mask=None):
        """Encode whole utterances; the mask is (B, T) bool, True = padding."""
        positions = self.positions(x) if self.positions is not None else None
        return self.encoder(x, src_key_padding_mask=mask, pos_embs=positions)[0]

    def make_context(self, config):
        """The context of a new stream."""
        if not isinstance(self.encoder, ConformerEncoder) or self.encoder.attention_type == "hypermixing":
            raise Unsupported("SpeechBrain does not stream it")
        if config.is_infinite_left_context():
            raise Unsupported("SpeechBrain does not stream with an unlimited left context")
        return self.encoder.make_streaming_context(config)

    def stream(self, x, context):
        """Encode one chunk (B, C, D)."""
        positions = None
        if self.positions is not None:  # for chunk and left context, as in TransformerASR.encode_streaming
            before = context.layers[0].mha_left_context
            frames = x.shape[1] + (0 if before is None else before.shape[1])
            positions = self.positions(x.new_empty(1, frames, x.shape[2]))
        return self.encoder.forward_streaming(x, context, positions)[0]


class TorchaudioModel(Model):
    """torchaudio's Conformer. It calls the layers, because torchaudio's forward always computes a mask from lengths."""

    def forward(self, x, mask=None):
        """Encode whole utterances; the mask is (B, T) bool, True = padding."""
        x = x.transpose(0, 1)
        for layer in self.encoder.conformer_layers:
            x = layer(x, mask)
        return x.transpose(0, 1)

    def make_context(self, config):
        """Raise Unsupported, because torchaudio does not stream it."""
        raise Unsupported("torchaudio does not stream it")


class WithFrontEnd(nn.Module):
    """Front end, input layer and encoder, from features (B, T, F)."""

    def __init__(self, front_end, model, d_model):
        super().__init__()
        self.front_end = front_end
        with torch.no_grad():
            width = self._frames(torch.zeros(1, 8, FEATURES))[0].shape[2]
        self.input = nn.Sequential(nn.Linear(width, d_model), nn.Dropout(0.1))
        self.model = model

    def forward(self, x, lens=None):
        """Map (B, T, F), with relative lengths (B,) in a padded batch, to (B, ceil(T / 4), D)."""
        x, lens = self._frames(x, lens)
        mask = None if lens is None else padding_mask(absolute_lengths(lens, x.shape[1]), x.shape[1])
        return self.model(self.input(x), mask)

    def _frames(self, x, lens=None):
        if isinstance(self.front_end, ConvolutionFrontEnd):  # takes no lengths
            return self.front_end(x).flatten(2), lens
        x, lens = self.front_end(x, lens)
        return x.flatten(2), lens


def our_front_end():
    """The front end of all our encoders."""
    return ConvolutionSubsampling(FEATURES, CHANNELS)


def speechbrain_front_end():
    """The ``CNN`` of SpeechBrain's published Transformer and Conformer recipes."""
    return ConvolutionFrontEnd(
        input_shape=(None, None, FEATURES),
        num_blocks=2,
        num_layers_per_block=1,
        out_channels=CHANNELS,
        kernel_sizes=(3, 3),
        strides=(2, 2),
        residuals=(False, False),
    )


@dataclass(frozen=True)
class Peer:
    """An encoder of another package."""

    source: str
    build: Callable
    """Builds a :class:`Model` from dimensions and the largest number of frames."""
    counterpart: str | None = None
    """Name of our encoder that computes the same with the same weights."""
    keys: dict = field(default_factory=dict)
    """Keys of our encoder."""
    note: str = ""
    no_compiled_training: str = ""
    """Why its training step must not be compiled."""


def _speechbrain_conformer(attention):
    def build(dims, frames):
        encoder = ConformerEncoder(
            dims.num_layers,
            dims.d_model,
            dims.d_ffn,
            dims.nhead,
            dims.kernel_size,
            dropout=dims.dropout,
            attention_type=attention,
        )
        if (
            attention == "hypermixing" and frames > 3000
        ):  # the length of its table of positions, for which its constructor has no key
            table = PositionalEncoding(dims.d_model, frames)
            for layer in encoder.layers:
                layer.mha_layer.positional_encoding = table
        return SpeechBrainModel(encoder, dims.d_model, relative=attention == "RelPosMHAXL")

    return build


def _speechbrain_branchformer(dims, frames):
    # The published recipe has a hidden width of 3072 for d_model 512, so 6 * d_model; there is no d_ffn.
    encoder = BranchformerEncoder(
        dims.num_layers, dims.d_model, dims.nhead, dims.kernel_size, dropout=dims.dropout, csgu_linear_units=6 * dims.d_model
    )
    return SpeechBrainModel(encoder, dims.d_model, relative=True)


def _torchaudio_conformer(dims, frames):
    from torchaudio.models import Conformer

    return TorchaudioModel(Conformer(dims.d_model, dims.nhead, dims.d_ffn, dims.num_layers, dims.kernel_size, dims.dropout))


PEERS = {
    "speechbrain_conformer": Peer(
        "SpeechBrain", _speechbrain_conformer("RelPosMHAXL"), "conformer", {"attention_type": "RelPosMHAXL"}
    ),
    "speechbrain_conformer_rope": Peer(
        "SpeechBrain",
        _speechbrain_conformer("RoPEMHA"),
        "conformer",
        {"attention_type": "RoPEMHA"},
        no_compiled_training="left out: compiled by torch 2.11 for a CPU, its training step ends the process",
    ),
    "speechbrain_hyperconformer": Peer(
        "SpeechBrain",
        _speechbrain_conformer("hypermixing"),
        "hyperconformer",
        note="for more than 120 s with a longer table of positions than its constructor makes",
    ),
    "speechbrain_branchformer": Peer("SpeechBrain", _speechbrain_branchformer, note="6 d_model hidden units, no d_ffn"),
    "torchaudio_conformer": Peer("torchaudio", _torchaudio_conformer, note="BatchNorm, no positions"),
}


@dataclass(frozen=True)
class Candidate:
    """A model with rows in the tables."""

    name: str
    source: str
    """"here", or the package of a peer."""
    size: str
    """"equal", or the name of one of the encoder's own sizes."""
    dims: str
    """The dimensions; for one of the encoder's sizes, those in its table of sizes."""
    encoder: str | None = None
    """Registered name of our encoder; None for a peer."""
    keys: tuple = ()
    """Its keys except the dimensions, as items."""
    twin: str | None = None
    """The peer that computes the same as our encoder."""

    @property
    def note(self):
        """A remark for the tables."""
        return "" if self.encoder else PEERS[self.name].note


def groups(encoders, peers, dims, own_sizes=True):
    """Groups of models to compare: first all at equal work, then each size of each encoder with the baseline.

    Arguments
    ---------
    encoders, peers : list of str
        Names. The baseline is always included, and so is the counterpart of a peer if its encoder is in ``encoders``.
    dims : Dimensions
        Dimensions at equal work.
    own_sizes : bool
        Whether to add the encoders' published sizes.

    Returns
    -------
    list of list of Candidate
        The groups, each with the baseline first.

    Example
    -------
    >>> equal, *others = groups(["squeezeformer"], ["speechbrain_conformer_rope"], Dimensions())
    >>> [candidate.name for candidate in equal]
    ['conformer', 'conformer, RoPEMHA', 'squeezeformer', 'speechbrain_conformer_rope']
    >>> [candidate.size for candidate in others[0]]
    ['equal', 'xs']
    """
    names = [BASELINE, *(name for name in encoders if name != BASELINE)]
    twins = {(name, ()): None for name in names}
    for peer_name in peers:
        peer = PEERS[peer_name]
        if peer.counterpart in names:
            twins[peer.counterpart, _unusual(peer.counterpart, peer.keys)] = peer_name
    equal = []
    for name in names:
        for (other, keys), twin in twins.items():
            if other == name:
                label = ", ".join([name, *(str(value) for _, value in keys)])
                equal.append(Candidate(label, "here", "equal", str(dims), name, keys, twin))
    result = [equal + [Candidate(name, PEERS[name].source, "equal", str(dims)) for name in peers]]
    for name in names if own_sizes else ():
        table = getattr(get_encoder(name), "sizes", {})
        for size in encoder_sizes(name):
            result.append([equal[0], Candidate(name, "here", size, _own_dims(table[size]), name, (("size", size),))])
    return result


def _unusual(name, keys):
    """Items of the keys that differ from the encoder's defaults."""
    defaults = inspect.signature(get_encoder(name).__init__).parameters
    return tuple((key, value) for key, value in keys.items() if defaults[key].default != value)


def _own_dims(row):
    values = {key: getattr(row, key, None) for key in ("d_model", "num_layers", "nhead", "d_ffn")}
    if None in values.values():
        return "its own"
    return "{d_model} x {num_layers}, {nhead} heads, ffn {d_ffn}".format(**values)


def build(group, dims, frames):
    """Build the models of a group in evaluation mode; counterparts get the same weights.

    Arguments
    ---------
    group : list of Candidate
        The models to build.
    dims : Dimensions
        Dimensions at equal work.
    frames : int
        The largest number of frames that they will get.

    Returns
    -------
    tuple
        Models by candidate, in the group's order; errors by candidate, for those that cannot be built; and the difference by
        candidate that :func:`assert_equal` found.

    Raises
    ------
    EqualityError
        If counterparts do not compute the same.
    """
    models, errors, found = {}, {}, {}
    for candidate in sorted(
        group, key=lambda candidate: candidate.encoder is not None
    ):  # peers first, because counterparts take their weights
        torch.manual_seed(0)
        twin = next((other for other in models if other.name == candidate.twin), None)
        try:
            if candidate.encoder is None:
                model = PEERS[candidate.name].build(dims, frames)
            else:
                model = Model(build_encoder(candidate.encoder, **_keys(candidate, dims, twin is not None)))
        except Exception as error:  # any error of one model must not stop the others
            if candidate is group[0]:
                raise
            errors[candidate] = one_line(error)
            continue
        if twin is not None:
            try:
                model.encoder.load_state_dict(convert_speechbrain(models[twin].encoder.state_dict(), dims.nhead))
            except (ValueError, RuntimeError) as error:
                raise EqualityError(f"{candidate.name} does not take the weights of {candidate.twin}: {error}") from error
            try:
                found[twin] = assert_equal(model, models[twin], dims.d_model, (candidate.name, candidate.twin))
            except EqualityError:
                raise
            except Exception as error:
                errors[twin] = f"it cannot be compared with {candidate.name}: {one_line(error)}"
                del models[twin]
        models[candidate] = model.eval()
    return {candidate: models[candidate] for candidate in group if candidate in models}, errors, found


def _keys(candidate, dims, converts):
    keys = dict(candidate.keys)
    known = encoder_keys(candidate.encoder)
    if candidate.size == "equal":
        keys = asdict(dims) | keys
    if converts and "speechbrain_scores" in known:  # SpeechBrain's weights need it; it takes no time
        keys["speechbrain_scores"] = True
    return {key: value for key, value in keys.items() if key in known}


@torch.no_grad()
def assert_equal(ours, theirs, d_model, names=("ours", "theirs")):
    """Compare the outputs of two models.

    Arguments
    ---------
    ours, theirs : Model
        The models; they are set to evaluation mode.
    d_model : int
        Width.
    names : tuple of str
        Names for the error message.

    Returns
    -------
    float
        The largest absolute difference.

    Raises
    ------
    EqualityError
        If it is larger than 1e-4.
    """
    x = torch.randn(2, 125, d_model, generator=torch.Generator().manual_seed(0))
    difference = (ours.eval()(x) - theirs.eval()(x)).abs().max().item()
    if not difference <= TOLERANCE:  # also refuses NaN
        raise EqualityError(
            f"{names[0]} and {names[1]} have the same weights, but their outputs differ by {difference:.3g}, more than "
            f"{TOLERANCE:g}, so their times cannot be compared; check the conversion of the weights."
        )
    return difference


def with_front_end(candidate, model, d_model):
    """A model with its front end; the encoder is shared, not copied."""
    torch.manual_seed(0)
    return WithFrontEnd(our_front_end() if candidate.encoder else speechbrain_front_end(), model, d_model).eval()


@functools.cache
def foldable(candidate):
    """Whether ``fuse_`` changes anything, tried on a small encoder; True if that cannot be built."""
    if candidate.encoder is None or not hasattr(get_encoder(candidate.encoder), "fuse_"):
        return False
    try:
        keys = _keys(replace(candidate, size="equal", keys=()), Dimensions(32, 4, 2, 32, 3), False)
        return folded(Model(build_encoder(candidate.encoder, **keys))) is not None
    except Exception:
        return True


def folded(model):
    """A fused copy of a model; None if there is nothing to fuse."""
    copied = copy.deepcopy(model)
    if not hasattr(copied.encoder, "fuse_"):
        return None
    copied.encoder.fuse_()
    before, after = model.state_dict(), copied.state_dict()
    return None if before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before) else copied


def in_int8(model):
    """A copy with 8-bit weights in linear layers, which also round their inputs to 8 bits (PyTorch's dynamic quantisation, on a
    CPU)."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, ScaledLinear) and child.scale is None:  # fused; PyTorch quantises only its own class
                linear = nn.Linear(child.in_features, child.out_features)
                linear.load_state_dict(child.state_dict())
                setattr(module, name, linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that another package will replace it
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
