"""``export``: a model as an ONNX file, or as a folder for another runtime."""

from speechbrain_ext.cli._common import add_model, add_pass, say, usage
from speechbrain_ext.utils.errors import UsageError


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="write a model as an ONNX file",
        description="Write a model for a runtime, and check it: the CTC branch as one file, or a transducer as three files.",
    )
    add_model(parser)
    add_pass(parser)
    parser.add_argument(
        "out", metavar="OUT", help="the file to write (for a transducer, OUT-encoder.onnx and so on); for sherpa-onnx, the folder"
    )
    parser.add_argument(
        "--runtime",
        choices=("onnxruntime", "sherpa-onnx"),
        default="onnxruntime",
        help="the runtime: onnxruntime (default), from samples to log-probabilities; or sherpa-onnx, from samples to text",
    )
    parser.add_argument("--int8", action="store_true", help="store the weights in 8 bits")
    parser.add_argument("--streaming", action="store_true", help="for streams: takes a chunk and the state, gives the next state")
    parser.add_argument(
        "--hotwords",
        action="store_true",
        help="for sherpa-onnx: export CTC as a transducer, because the runtime takes hotwords only with transducers",
    )
    parser.add_argument(
        "--chunk-size", type=int, metavar="FRAMES", help="of streams, in frames of 40 ms; by default the value of the model"
    )
    parser.add_argument(
        "--left-context", type=int, metavar="CHUNKS", help="of streams, in chunks, -1 = all; by default the value of the model"
    )
    parser.add_argument(
        "--audio",
        metavar="FILE",
        nargs="+",
        default=(),
        help="audio files, or folders in LibriSpeech layout, for the check; give OUT before them",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="allowed difference of log-probabilities (1e-3); with --int8, token error rate (0.05, or 0.5 without --audio)",
    )
    parser.set_defaults(run=run)


def run(arguments):
    """Write an ONNX file or a folder, and print the report of the check."""
    if not arguments.streaming and (arguments.chunk_size, arguments.left_context) != (None, None):
        raise UsageError("--chunk-size and --left-context are for streams; add --streaming.")
    is_sherpa = arguments.runtime == "sherpa-onnx"
    if arguments.hotwords and not is_sherpa:
        raise UsageError("--hotwords is for sherpa-onnx; add --runtime sherpa-onnx.")
    with usage():
        from speechbrain_ext.export.onnx_model import export_model
        from speechbrain_ext.export.onnx_write import ExportError
        from speechbrain_ext.export.sherpa_folder import export_sherpa

        export = export_sherpa if is_sherpa else export_model
        options = ["pass_name", "int8", "audio", "tolerance", "streaming", "chunk_size", "left_context", "trust"]
        options += ["hotwords"] if is_sherpa else []
        try:
            report = export(arguments.model, arguments.out, **{key: getattr(arguments, key) for key in options})
        except ExportError as error:
            say(error)
            return 1
    print(report)
    return 0
