#!/usr/bin/env python3
"""Train and test a speech recogniser, with any recipe.

python train.py hparams/FILE.yaml                                                   the embedded mini corpus, minutes
python train.py hparams/FILE.yaml --data_folder /path/to/LibriSpeech                LibriSpeech
python train.py hparams/FILE.yaml --train_manifest FILE --valid_manifest FILE       your own data
python train.py hparams/FILE.yaml --corpus my/corpus.yaml --data_folder FOLDER      your own corpus file
python train.py hparams/finetune.yaml --init_from MODEL --train_manifest ...        fine-tuning
torchrun --nproc_per_node 4 train.py hparams/FILE.yaml --data_folder FOLDER         several GPUs

An interrupted run continues with the same command. Every key of the hparams file is an option, such as --number_of_epochs 50;
docs/hparams.md lists them. Needed most often:
--output_folder FOLDER                               where the run writes (results/<experiment>/<seed>)
--device cpu, --device cuda:1                        by default a GPU if there is one
--precision bf16                                     mixed precision, on a GPU
--train_batch_sampler '{max_batch_length: 150}'      seconds of audio in a batch: less if the memory does not suffice
--logger tensorboard, --logger wandb                 losses and error rates in a browser
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # corpus files name functions in recipes/

import speechbrain as sb  # noqa: E402
import torch  # noqa: E402

from speechbrain_ext.training.report import list_hparams, list_options, print_help  # noqa: E402
from speechbrain_ext.training.run import run  # noqa: E402
from speechbrain_ext.training.settings import REFUSED, begin_processes, take_paths  # noqa: E402
from speechbrain_ext.utils.errors import UsageError, UserError, one_line  # noqa: E402


def main(argv=None):
    """Train and test; returns the exit status: 0 for success, 2 for wrong arguments, 130 for an interruption, else 1."""
    argv, paths = take_paths(list(sys.argv[1:] if argv is None else argv))
    if not argv or {"-h", "--help"} & {*argv}:
        said = f"{__doc__}\nFiles in hparams/:\n\n{list_hparams(ROOT / 'hparams')}"
        print_help(said + f"\n\nOptions of SpeechBrain:\n\n{list_options(without=REFUSED)}" * bool(argv))
        return 0
    corpus = paths.pop("corpus", None)
    if corpus:
        sys.path.insert(0, str(Path(corpus).resolve().parent))  # its functions may lie beside it
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    sys.path.append(str(Path(hparams_file).resolve().parent))  # your own classes may lie beside it, and hide no package
    try:
        run_opts = begin_processes(run_opts)
        corpora = (ROOT / "recipes" / name / "corpus.yaml" for name in ("Synthetic", "Manifest"))
        run(hparams_file, run_opts, overrides, paths, corpus, *corpora)
    except (UserError, OSError) as error:
        print(f"train.py: {one_line(error, 1000)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("train.py: interrupted; run the same command again to continue from the last checkpoint.", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # else gloo may abort at exit
    return 0


if __name__ == "__main__":
    sys.exit(main())
