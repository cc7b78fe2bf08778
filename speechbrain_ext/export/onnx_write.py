"""Writes a graph as an ONNX file with metadata, in float32 or 8 bits."""

import contextlib
import importlib
import io
import json
import logging
import warnings

import torch

from speechbrain_ext.utils.errors import UserImportError, UserRuntimeError, one_line

FRONT_END = ("features", "encoder.subsampling")
"""Modules that remain in float32."""
IR_VERSION = 9
"""The first version with opset 20. onnxruntime 1.17 or later reads it; version 10 needs 1.18 or later."""


class ExportError(UserRuntimeError):
    """A model cannot be exported, or its file gives other outputs; the message names the cause and the remedy."""


def require_packages():
    """Raise an ImportError that says what to install, if a package for ONNX is missing."""
    try:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise UserImportError(f"Export needs the package {error.name}; install it with: pip install -e '.[export]'") from error


def write_onnx(graph, path, int8, metadata):
    """Write a graph as an ONNX file.

    Arguments
    ---------
    graph : torch.nn.Module
        With ``example_inputs()``, ``dynamic_shapes``, ``input_names`` and ``output_names``, and the encoder as ``encoder``.
    path : str or os.PathLike
        The file.
    int8 : bool
        Whether to store the weights of matrix products in 8 bits.
    metadata : dict
        Texts for its ``metadata_props``.

    Raises
    ------
    ExportError
        If the graph has an operation that ONNX lacks.
    OSError
        If the file cannot be written.
    """
    import onnx

    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph,
                graph.example_inputs(),
                input_names=list(graph.input_names),
                output_names=list(graph.output_names),
                dynamic_shapes=graph.dynamic_shapes,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter has a class of error per stage
            name = type(graph.encoder.transformer.encoder if hasattr(graph, "encoder") else graph).__name__
            cause = one_line(error.__cause__ or error)
            raise ExportError(f"{name} has an operation that ONNX export cannot express; rewrite it: {cause}") from error
    proto = program.model_proto
    floating = _floating(proto.graph)
    _strip(proto)
    proto.ir_version = IR_VERSION
    if int8:
        _quantise(proto, path, floating)
        proto = onnx.load(path)
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)


def _floating(graph):
    """Names of the nodes that always remain in float32."""
    # Weights per head: the runtime has no scales per output for batched products
    batched = {weight.name for weight in graph.initializer if len(weight.dims) > 2}
    return [
        node.name
        for node in graph.node
        # By the weight's name, because a call of a method of the front end leaves no scope
        if _scope(node).startswith(FRONT_END)
        or any(name.startswith(FRONT_END) for name in node.input)
        or (node.op_type == "MatMul" and batched.intersection(node.input))
    ]


def _scope(node):
    """Path of the module that made a node, such as ``transformer.encoder.layers.0``."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            return next((name for name in json.loads(entry.value.replace("'", '"')) if name), "")
    return ""


def _strip(proto):
    """Remove the paths of Python files that the exporter writes into each node."""
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def _quantise(proto, path, floating):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            proto,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=floating,
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Seven bits: sums of 8-bit products overflow in processors without VNNI, so errors would depend on the processor.
            reduce_range=True,
        )


@contextlib.contextmanager
def _quiet():
    """A context without the exporter's messages about packages that are not needed here."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
