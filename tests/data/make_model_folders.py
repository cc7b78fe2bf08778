"""Make the model folders that must always load: one of each kind, in this version of the format.

    python tests/data/make_model_folders.py VERSION KIND...

It was run once for each version of the format and each kind. Its output never changes.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from tiny import make_model  # noqa: E402

from speechbrain_ext.inference import load_model  # noqa: E402
from speechbrain_ext.model_folder.write import model_parts, write_model_folder  # noqa: E402

SMALL = {"d_model": 8, "nhead": 2, "num_encoder_layers": 3, "d_ffn": 8, "kernel_size": 3}
KINDS = {
    "ctc": ("hyperconformer", 0, {}),
    "joint": ("conformer", 1, {}),
    "cascade": ("practical_conformer", 0, {}),
    "fused": ("fusionformer", 0, {}),
    "transducer": ("hyperconformer_transducer", 0, {"predictor_size": 8, "joint_size": 8}),
}


def main(version, *kinds):
    for kind, (name, layers, keys) in ((kind, KINDS[kind]) for kind in kinds):
        torch.manual_seed(0)
        folder = HERE / "model_folders" / f"{kind}-v{version}"
        with tempfile.TemporaryDirectory() as place:
            place = Path(place)
            subsampling = {"subsampling": "{channels: [4, 4]}"}
            hparams = make_model(place, layers, name, **SMALL, **subsampling, **keys)
            if kind == "fused":
                text = (place / "hparams.yaml").read_text()
                hparams["subsampling"].fuse_()
                hparams["Transformer"].encoder.fuse_()
                write_model_folder(place / "model", text, hparams, model_parts(hparams), place / "t.model", fused=True)
            if kind == "transducer":  # make it predict tokens
                text = (place / "hparams.yaml").read_text()
                with torch.no_grad():
                    hparams["transducer"].out.weight.mul_(10)
                    hparams["transducer"].out.bias[0] -= 2
                write_model_folder(place / "model", text, hparams, model_parts(hparams), place / "t.model")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(place / "model", folder)
        model = load_model(folder, "cpu")
        wav = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
        answer = model.frames(wav, torch.ones(1))[0][0]
        expected = {"frames": len(answer), "tokens": answer.argmax(-1).tolist(), "first": answer[0].tolist()}
        if kind == "transducer":
            expected["said"] = model.transcribe_batch(wav, torch.ones(1))[1][0]
        (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
