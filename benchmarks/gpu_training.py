"""Train the five architectures at once on one GPU until a time limit; benchmarks/gpu.py starts it.

    python benchmarks/gpu_training.py prepare --work FOLDER --data FOLDER [FOLDER ...] --test FOLDER [...] [--dev FOLDER]
    python benchmarks/gpu_training.py hyperconformer --work FOLDER --out FOLDER --until SECONDS

``prepare`` checks the audio, takes ``--dev`` for validation or else some speakers of the training data, trains the tokenizer, and
computes all features in batches on the device. Then each architecture has a process. It keeps the features on the device and
gathers batches there, so that only indices are copied to the device. All else is as in ``train.py``: hparams files with the
settings for small corpora (``recipes/MiniLibriSpeech/corpus.yaml``: front end, size, augmentation), ``gpu_training.yaml``,
Brains, tests and model folders. The learning rate depends on the time: it rises to its peak in the first tenth of the time, and
falls to zero at the end.
"""

import argparse
import copy
import dataclasses
import itertools
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain import Stage
from speechbrain.dataio.batch import PaddedData
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.LibriSpeech.prepare import prepare_librispeech  # noqa: E402
from speechbrain_ext.dataio.audio import load_audio  # noqa: E402
from speechbrain_ext.dataio.datasets import (  # noqa: E402
    MANIFEST_FIELDS,
    drop_unfit,
    loader_options,
    make_datasets,
    merge_manifests,
    read_manifest,
)
from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask, zero_padding  # noqa: E402
from speechbrain_ext.model_folder.write import write_model_folder  # noqa: E402
from speechbrain_ext.training.results import append_rows  # noqa: E402
from speechbrain_ext.training.run import (  # noqa: E402
    TRAIN,
    VALID,
    make_brain,
    make_rows,
    prepare_tokenizer,
    seconds_of,
    statistics_batches,
    with_tokenizer,
)
from speechbrain_ext.training.settings import Setting  # noqa: E402
from speechbrain_ext.utils.errors import UserError, one_line  # noqa: E402
from speechbrain_ext.utils.files import replacing, write_csv  # noqa: E402
from speechbrain_ext.utils.machine import describe_machine, keep_freed_memory  # noqa: E402

ARCHITECTURES = ("hyperconformer", "conformer", "squeezeformer", "fusionformer", "practical_conformer")
"""Names of the architectures, the stems of their hparams files."""
TINY = {
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 2,
    "d_ffn": 32,
    "vocab_size": 32,
    "number_of_epochs": 2,
    "train_batch_sampler": {"max_batch_length": 5},
}
HELD_OUT = 0.03
"""Share of the training data for validation, without ``--dev``."""
VALIDATIONS = 12
MERGED, DEV, FEATURES = "train+merged.csv", "train+held-out.csv", "features.pt"


def setting_of(name, work, tiny, splits=((), ())):
    """The hparams of a run."""
    train, test = map(list, splits)
    overrides = {"output_folder": str(work / name), "results_file": str(work / name / "results.csv"), "card": {}}
    overrides |= {"train_splits": train, "test_splits": test, "data_folder": str(work / "corpus")}
    files = (
        ROOT / "hparams" / f"{name}.yaml",
        ROOT / "recipes" / "MiniLibriSpeech" / "corpus.yaml",
        Path(__file__).with_suffix(".yaml"),
    )
    return Setting([*files], overrides | (TINY if tiny else {}), "")


# ---------------------------------------------------------------------- before training


def link_splits(folders, corpus):
    """Link the folders into one corpus folder under different names; returns the names."""
    names = []
    for folder in folders:
        name = Path(folder).resolve().name.lstrip(".") or "split"
        if not Path(folder).is_dir():
            raise UserError(f"'{folder}' is not a folder; give a folder with speech in LibriSpeech layout.")
        while name in names or (corpus / name).exists():
            name += "-more"
        (corpus / name).symlink_to(Path(folder).resolve(), target_is_directory=True)
        names.append(name)
    return names


def hold_out(rows):
    """Divide the rows of a manifest into training and validation; validation gets whole speakers, those with the least speech.

    Example
    -------
    >>> rows = [{"ID": str(i), "spk_id": f"{i % 2}-1", "duration": 1 + i % 2} for i in range(4)]
    >>> [[row["ID"] for row in part] for part in hold_out(rows)]
    [['1', '3'], ['0', '2']]
    """
    speakers = {}
    for row in rows:
        speakers.setdefault(row["spk_id"].split("-")[0], []).append(row)
    by_length = sorted(speakers.values(), key=lambda said: sum(float(row["duration"]) for row in said))
    wanted = HELD_OUT * sum(float(row["duration"]) for row in rows)
    held = []
    for said in by_length[:-1]:
        if sum(float(row["duration"]) for row in held) < wanted:
            held += said
    held = held or rows[:: round(1 / HELD_OUT)]  # if there is only one speaker
    ids = {row["ID"] for row in held}
    return [row for row in rows if row["ID"] not in ids], held


def prepare(work, data, test, device, tiny, dev=None):
    """Write manifests, tokenizer and features; returns the names of the splits."""
    corpus = work / "corpus"
    corpus.mkdir(parents=True)
    splits = link_splits(data, corpus), link_splits(test, corpus)
    valid = link_splits([dev] if dev else [], corpus)
    prepare_librispeech(corpus, work, splits[0], valid, splits[1])
    merged = work / MERGED
    merge_manifests([work / f"{split}.csv" for split in splits[0]], merged)
    rows = read_manifest(merged)
    if len(rows) < 2:
        raise UserError(f"There are {len(rows)} utterances in {', '.join(map(str, data))}; give more to train on.")
    parts = (rows, read_manifest(work / f"{valid[0]}.csv")) if valid else hold_out(rows)
    for path, part in zip((merged, work / DEV), parts, strict=True):
        write_csv(path, MANIFEST_FIELDS, [[row[field] for field in MANIFEST_FIELDS] for row in part])
    setting = setting_of("hyperconformer", work, tiny, splits).replace(output_folder=str(work))
    hparams = setting.load()
    prepare_tokenizer(hparams, merged)
    features = compute_features(
        hparams["speech_encoder"], [merged, work / DEV, *(work / f"{name}.csv" for name in splits[1])], device
    )
    torch.save(features | {"splits": splits}, work / FEATURES)
    return splits


@torch.no_grad()
def compute_features(speech_encoder, manifests, device, seconds=600):
    """Compute the features of all utterances, in batches of similar length and up to ``seconds``; a thread per core reads audio.

    Returns
    -------
    dict
        ``features`` (frames of all utterances, F), ``ids``, and ``frames``, the number of frames of each utterance.
    """
    rows = sorted((row for path in manifests for row in read_manifest(path)), key=lambda row: float(row["duration"]))
    compute = speech_encoder.to(device).eval().features
    batches = [[]]
    for row in rows:
        if batches[-1] and float(row["duration"]) * (len(batches[-1]) + 1) > seconds:
            batches.append([])
        batches[-1].append(row)
    found, frames = [], []
    with ThreadPoolExecutor(os.cpu_count()) as readers:
        for batch in batches:
            wavs = list(readers.map(load_audio, [row["wav"] for row in batch]))
            lens = torch.tensor([len(wav) for wav in wavs])
            feats, lens = compute(pad_sequence(wavs, True).to(device), (lens / lens.max()).to(device))
            lengths = absolute_lengths(lens, feats.shape[1])
            found.append(feats[~padding_mask(lengths, feats.shape[1])])
            frames += lengths.tolist()
    return {"features": torch.cat(found).cpu(), "ids": [row["ID"] for row in rows], "frames": frames}


def places_of(stored):
    """First frame and number of frames by id, from the result of :func:`compute_features`."""
    starts = itertools.accumulate(stored["frames"], initial=0)
    return dict(zip(stored["ids"], zip(starts, stored["frames"], strict=False), strict=True))


# ---------------------------------------------------------------------- batches


@dataclasses.dataclass
class Batch:
    """The parts of a :class:`speechbrain_ext.dataio.datasets.Batch` that a Brain uses, already on its device."""

    id: list
    wrd: list
    duration: torch.Tensor
    feats: PaddedData
    tokens: PaddedData
    tokens_bos: PaddedData
    tokens_eos: PaddedData
    host_lengths: dict

    def to(self, device):
        """Return the batch, which is already on the device."""
        return self


class OnDevice(torch.utils.data.Dataset):
    """The utterances of a dataset by index; :meth:`collate` gathers a batch on the device.

    Arguments
    ---------
    dataset : DynamicItemDataset
        A dataset of :func:`speechbrain_ext.dataio.datasets.make_datasets`.
    features : torch.Tensor
        (frames of all utterances, F), on the device.
    places : dict
        First frame and number of frames by id.
    """

    def __init__(self, dataset, features, places):
        self.features, self.data = features, dataset.data
        device = features.device
        with dataset.output_keys_as(["id", "wrd", "duration", "tokens", "tokens_bos", "tokens_eos"]):
            items = [dataset[index] for index in range(len(dataset))]
        self.ids, self.texts = ([item[key] for item in items] for key in ("id", "wrd"))
        self.durations = torch.tensor([float(item["duration"]) for item in items], dtype=torch.float64)
        starts, self.frames = zip(*(places[name] for name in self.ids), strict=True)
        self.starts, self.frames_there = (torch.tensor(values, device=device) for values in (starts, self.frames))
        self.tokens = {}
        for key in ("tokens", "tokens_bos", "tokens_eos"):
            lengths = [len(item[key]) for item in items]
            padded = pad_sequence([item[key] for item in items], True).to(device)
            self.tokens[key] = padded, lengths, torch.tensor(lengths, device=device)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return index

    def collate(self, indices):
        """Make a batch of the utterances with these indices."""
        index = torch.tensor(indices)
        durations = self.durations[index]
        index = (index.pin_memory() if self.features.is_cuda else index).to(self.features.device, non_blocking=True)
        frames = max(self.frames[i] for i in indices)
        host_lengths = {"feats": torch.tensor([self.frames[i] / frames for i in indices])}
        positions = self.starts[index].unsqueeze(1) + torch.arange(frames, device=index.device)
        lengths = self.frames_there[index]
        feats = zero_padding(self.features[positions.clamp(max=len(self.features) - 1)], padding_mask(lengths, frames))
        tokens = {}
        for key, (padded, lengths_here, lengths_there) in self.tokens.items():
            longest = max(lengths_here[i] for i in indices)
            host_lengths[key] = torch.tensor([lengths_here[i] / max(1, longest) for i in indices])
            tokens[key] = PaddedData(padded[index, :longest], lengths_there[index] / max(1, longest))
        ids, texts = ([values[i] for i in indices] for values in (self.ids, self.texts))
        return Batch(ids, texts, durations, PaddedData(feats, lengths / frames), **tokens, host_lengths=host_lengths)

    def options(self, dataset, batch_sampler):
        """Options of a loader."""
        return loader_options(dataset, batch_sampler, 0) | {"collate_fn": self.collate, "pin_memory": False}


# ---------------------------------------------------------------------- training by the clock


class Clock:
    """A learning rate by elapsed time: it rises to the peak in a tenth of the time, and falls to zero.

    Arguments
    ---------
    peak : float
        The highest rate.
    until : float
        The end of training, as a value of ``time.time()``.

    Example
    -------
    >>> import time
    >>> round(Clock(0.002, time.time() + 1000).rate(share=0.55), 4)
    0.001
    """

    def __init__(self, peak, until):
        self.peak, self.until, self.began = peak, until, time.time()

    @property
    def share(self):
        """Share of the time that has passed, 0 to 1."""
        return min(1.0, (time.time() - self.began) / max(self.until - self.began, 1e-9))

    def rate(self, share):
        """The learning rate after a share of the time."""
        return self.peak * min(share / 0.1, (1 - share) / 0.9)

    def __call__(self, optimizer):
        """Set the optimizer's learning rate, as SpeechBrain's schedulers do."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(self.share)


class ByTheClock:
    """Mixin for a Brain: training ends at a time, and validates at even intervals of time, not after each epoch."""

    def start_clock(self, clock, report):
        """Set the :class:`Clock`, and the function to call after each validation."""
        self.time, self.report, self.validated = clock, report, 0

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """End training after the step in which the time ends."""
        super().on_fit_batch_end(batch, outputs, loss, should_step)
        if self.time.share == 1:
            self.optimizer_step_limit = self.optimizer_step

    def _fit_valid(self, valid_set, epoch, enable):
        last = self.time.share == 1 or epoch == self.hparams.number_of_epochs
        if last or self.time.share >= self.validated / VALIDATIONS:
            self.validated = 1 + int(self.time.share * VALIDATIONS)
            super()._fit_valid(valid_set, epoch, enable)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """End the stage as usual, and report after a validation."""
        super().on_stage_end(stage, stage_loss, epoch)
        if stage == Stage.VALID:
            errors = self.error_rates[self.selection].summarize()
            self.report(self, loss=round(float(stage_loss), 3), WER=round(errors["WER"], 2), words=errors["num_scored_tokens"])


def train(name, work, out, until, device, precision, tiny):
    """Train one architecture until the time is over, test it, and save curve, error rates and model."""
    stored = torch.load(work / FEATURES, mmap=True)
    splits = stored["splits"]
    setting = setting_of(name, work, tiny, splits)
    (work / name).mkdir()
    hparams = setting.load()
    tokenizer_file, tokens = prepare_tokenizer(hparams | {"output_folder": str(work)}, work / MERGED)
    setting, hparams = with_tokenizer(setting, hparams, tokenizer_file, tokens)
    manifests = {TRAIN: work / MERGED, VALID: work / DEV} | {split: work / f"{split}.csv" for split in splits[1]}
    datasets = make_datasets(hparams, manifests)
    for key, part in ((TRAIN, "train"), (VALID, "held-out")):
        drop_unfit(datasets[key], hparams, work / name / f"unfit_{part}.csv", part)
    hparams["brain"] = type("TimedBrain", (ByTheClock, hparams["brain"]), {})
    file, run_opts, _ = sb.parse_arguments([f"{name}.yaml", "--device", device, "--precision", precision, "--noprogressbar"])
    brain = make_brain(hparams, run_opts)

    places, features = places_of(stored), stored["features"].to(brain.device)
    there = {key: OnDevice(dataset, features, places) for key, dataset in datasets.items()}
    options = {
        key: there[key].options(dataset, hparams["train_batch_sampler" if key is TRAIN else "eval_batch_sampler"])
        for key, dataset in datasets.items()
    }
    audio, began = seconds_of(datasets[TRAIN]), time.time()
    machine = describe_machine(str(brain.device))

    def report(brain, split="held-out", **found):
        row = {
            "architecture": name,
            "set": split,
            "search": brain.selection,
            "seconds": round(time.time() - began, 1),
            "epochs": round(brain.audio_seconds / audio, 2),
            "steps": brain.optimizer_step,
            "audio_seconds_per_second": round(brain.audio_seconds / max(brain.train_seconds, 1e-9), 1),
            "train_loss": round(brain.train_stats["loss"], 3),
            "loss": "",
            **found,
        }
        size = sum(parameter.numel() for parameter in brain.modules.parameters())
        rest = {"parameters": size, "train_hours": round(audio / 3600, 2), "precision": precision}
        append_rows(out / "training.csv", [row | rest | machine])
        print(*(f"{key} {value}" for key, value in row.items() if value != ""), sep=", ", flush=True)

    brain.start_clock(Clock(hparams["lr"], until), report)
    hparams["lr_annealing"] = brain.hparams.lr_annealing = brain.time
    kinds = {"train_loader_kwargs": options[TRAIN], "valid_loader_kwargs": options[VALID]}
    brain.fit(hparams["epoch_counter"], there[TRAIN], there[VALID], **kinds)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    weights, fused = brain.make_final(statistics_batches(brain, there[TRAIN], options[TRAIN]))["pretrained"]
    model, archive = (copy.deepcopy(weights).half(), fused), out / f"{name}.zip"
    save(brain, setting, model, tokenizer_file, [], archive)  # before the tests, which the time limit may stop
    rows = []
    for split in splits[1]:
        brain.evaluate(there[split], test_loader_kwargs=options[split])
        rows += make_rows(brain, split, file, setting, audio)
        for row in (row for row in rows if row.test_set == split):
            report(brain, split, search=row.search, WER=row.WER, words=row.words)
    save(brain, setting, model, tokenizer_file, rows, archive)


def save(brain, setting, model, tokenizer_file, rows, archive):
    """Write the model folder, with results, alignments and log so far, as one archive."""
    folder = Path(brain.hparams.output_folder)
    write_model_folder(folder / "pretrained", setting.text(), vars(brain.hparams), model[0], tokenizer_file, rows, model[1])
    append_rows(brain.hparams.results_file, rows)
    with replacing(archive, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as files:
        for path in sorted([*folder.glob("pretrained/*"), *folder.glob("*.csv"), *folder.glob("*.txt")]):
            files.write(path, Path(archive.stem, path.relative_to(folder)))


def main(argv=None):
    """Run a step; the exit status is 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("prepare", *ARCHITECTURES))
    parser.add_argument("--work", type=Path, required=True, help="folder for files that the steps share")
    parser.add_argument("--data", nargs="+", help="folders to train on, in LibriSpeech layout")
    parser.add_argument("--test", nargs="+", help="folders to test on")
    parser.add_argument("--dev", help="folder for validation")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--until", type=float, help="end of training, as a value of time.time()")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    needed = ("data", "test") if arguments.step == "prepare" else ("until",)
    if missing := [f"--{key}" for key in needed if getattr(arguments, key) is None]:
        parser.error(f"{arguments.step} needs {' and '.join(missing)}")
    keep_freed_memory()
    try:
        if arguments.step == "prepare":
            prepare(arguments.work, arguments.data, arguments.test, arguments.device, arguments.tiny, arguments.dev)
        else:
            given = arguments.out, arguments.until, arguments.device, arguments.precision, arguments.tiny
            train(arguments.step, arguments.work, *given)
    except (UserError, OSError) as error:
        print(f"gpu_training.py: {one_line(error, 1000)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
