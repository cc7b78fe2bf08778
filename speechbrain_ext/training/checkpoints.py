"""Checkpoints that survive an interruption at any time, and hold everything that a run needs to continue."""

import json
import logging
import os
import random
import re
import shutil

import numpy as np
import torch
import yaml
from speechbrain.nnet.schedulers import InverseSquareRootScheduler
from speechbrain.utils.checkpoints import (
    DEFAULT_LOAD_HOOKS,
    METAFNAME,
    Checkpoint,
    Checkpointer,
    ckpt_recency,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.logger import get_logger
from speechbrain.utils.seed import seed_everything

from speechbrain_ext.utils.distributed import process_number
from speechbrain_ext.utils.errors import UserError, UserRuntimeError, one_line

logger = get_logger(__name__)

PARTIAL_PREFIX = "partial-"  # SpeechBrain only reads folders whose name begins with CKPT


class DamagedCheckpoint(UserRuntimeError):
    """A checkpoint that cannot be loaded; the message names it."""


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer with checkpoints that are complete or absent.

    A run that is killed while SpeechBrain writes or deletes a checkpoint leaves an incomplete one, and the next start tries to
    load it. This class writes a checkpoint under another name and then renames it; before it deletes one, it renames it too. It
    never deletes the latest checkpoint.

    Arguments
    ---------
    checkpoints_dir : str
        The folder of the checkpoints.
    recoverables : dict, optional
        Objects to save, by name.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> checkpointer = AtomicCheckpointer(folder, {"model": torch.nn.Linear(1, 1)})
    >>> checkpointer.save_and_keep_only(meta={"WER": 10.0}, min_keys=["WER"])
    >>> checkpointer.save_and_keep_only(meta={"WER": 12.0}, min_keys=["WER"], keep_recent=False)
    >>> sorted(checkpoint.meta["WER"] for checkpoint in checkpointer.list_checkpoints())
    [10.0, 12.0]
    """

    def save_checkpoint(self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO):
        """Save as SpeechBrain does, with the number of processes in the metadata.

        Raises
        ------
        UserRuntimeError
            If the checkpoint cannot be written, as on a full disk; earlier checkpoints stay unchanged.
        """
        if if_main_process():
            for leftover in self.checkpoints_dir.glob(PARTIAL_PREFIX + "*"):
                shutil.rmtree(leftover)
        meta = {**(meta or {}), "processes": _processes()}
        try:
            partial = super().save_checkpoint(meta, end_of_epoch, name, verbosity=logging.DEBUG)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError with one of these causes
            if isinstance(error, RuntimeError) and not re.search("writ|iostream|unexpected pos", str(error)):
                raise
            raise UserRuntimeError(
                f"No checkpoint can be written to {self.checkpoints_dir} ({one_line(error, 150)}); free some space, and run the "
                "same command again: earlier checkpoints are unchanged."
            ) from error
        ddp_barrier()  # other processes also write to the folder
        saved = None
        if partial is not None:
            path = partial.path.with_name(partial.path.name.removeprefix(PARTIAL_PREFIX))
            os.replace(partial.path, path)
            logger.log(verbosity, "Saved the checkpoint %s", path)
            saved = Checkpoint(path, partial.meta, {name: path / file.name for name, file in partial.paramfiles.items()})
        ddp_barrier()
        return saved

    def recover_if_possible(self, *args, ckpt_predicate=None, **keys):
        """Recover as SpeechBrain does, but not inside an epoch that began with another number of processes.

        Each process has its share of the batches. With another number, some utterances would be visited twice, and others never.
        The run then continues from the end of the previous epoch.
        """

        def is_wanted(checkpoint):
            return self.fits(checkpoint) and (ckpt_predicate is None or ckpt_predicate(checkpoint))

        latest = self.find_checkpoint(ckpt_predicate=ckpt_predicate)
        if latest is not None and not self.fits(latest):
            logger.warning(
                "The run had %s processes, and now has %s: the epoch begins again.", latest.meta.get("processes"), _processes()
            )
        return super().recover_if_possible(*args, ckpt_predicate=is_wanted, **keys)

    @staticmethod
    def fits(checkpoint):
        """Whether this number of processes can continue from a checkpoint."""
        return bool(checkpoint.meta.get("processes") == _processes() or checkpoint.meta.get("end-of-epoch"))

    def load_checkpoint(self, checkpoint):
        """Load as SpeechBrain does, with a one-sentence error for missing or broken files."""
        try:
            super().load_checkpoint(checkpoint)
        except UserError:
            raise
        except Exception as error:  # unpickling a broken file can raise any error
            cause = one_line(error)
            if "Weights only load failed" in cause:  # torch's message advises to run the code in the file
                cause = "one of its files is not a checkpoint, or holds code"
            if cause.startswith("Don't know how to load"):
                raise  # a class without a loader; the checkpoint is sound
            if "loading state_dict" in cause or "parameter group" in cause:
                raise UserRuntimeError(
                    f"The checkpoint {checkpoint.path} belongs to another model or optimizer; continue with the code and the "
                    f"settings that wrote it, or give another --output_folder ({cause})."
                ) from error
            raise DamagedCheckpoint(
                f"The checkpoint {checkpoint.path} cannot be loaded; delete it to continue from the previous one ({cause})."
            ) from error

    @staticmethod
    def _construct_checkpoint_objects(checkpoint_dirs):
        """List checkpoints as SpeechBrain does, with a one-sentence error for broken files, as after a power failure."""
        checkpoints = []
        for path in checkpoint_dirs:
            try:
                (checkpoint,) = Checkpointer._construct_checkpoint_objects([path])
                float(checkpoint.meta["unixtime"])
            except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
                raise DamagedCheckpoint(
                    f"The checkpoint {path} is damaged: its {METAFNAME} cannot be read ({one_line(error, 100)}); delete it to "
                    "continue from the previous one."
                ) from error
            checkpoints.append(checkpoint)
        return checkpoints

    def _new_checkpoint_dirpath(self):
        return self._partial(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name):
        return self._partial(super()._custom_checkpoint_dirpath(name))

    def delete_checkpoints(
        self, *, num_to_keep=1, min_keys=None, max_keys=None, importance_keys=(ckpt_recency,), ckpt_predicate=None, **_
    ):
        """Delete as SpeechBrain does, but rename a checkpoint before it is deleted, and keep the latest one."""
        orders = [{"min_key": key} for key in min_keys or ()] + [{"max_key": key} for key in max_keys or ()]
        orders += [{"importance_key": key} for key in importance_keys]
        ddp_barrier()
        if if_main_process():
            latest = self.find_checkpoint()
            found, kept = {}, {latest.path} if latest else set()
            for order in orders:
                ranked = self.find_checkpoints(ckpt_predicate=ckpt_predicate, **order)
                found.update({checkpoint.path: checkpoint for checkpoint in ranked})
                kept.update(checkpoint.path for checkpoint in ranked[:num_to_keep])
            for path in found.keys() - kept:
                partial = self._partial(path)
                os.replace(path, partial)
                shutil.rmtree(partial)
        ddp_barrier()

    @staticmethod
    def _partial(path):
        return path.with_name(PARTIAL_PREFIX + path.name)


class Origin:
    """Facts about a run that a Checkpointer saves, and compares when it recovers.

    Arguments
    ---------
    **facts
        Values by name, such as a digest of the training utterances.

    Example
    -------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "origin.ckpt"
    >>> Origin(utterances="a").save(path)
    >>> Origin(utterances="b").load(path, end_of_epoch=True)
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: This run began with other utterances; give another --output_folder.
    """

    def __init__(self, **facts):
        self.facts = facts

    @mark_as_saver
    def save(self, path):
        """Write the facts to a file."""
        path.write_text(json.dumps(self.facts), encoding="utf-8")

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Compare the facts with those in a file."""
        del end_of_epoch
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in self.facts.items():
            if before.get(name) != value:
                raise UserError(f"This run began with other {name}; give another --output_folder.")


register_checkpoint_hooks(Origin)


def _load_steps(schedule, path, end_of_epoch):
    """Load what InverseSquareRootScheduler saves; SpeechBrain has no loader for it."""
    del end_of_epoch  # the same within an epoch and at its end
    schedule.n_steps = torch.load(path)["n_steps"]


DEFAULT_LOAD_HOOKS.setdefault(InverseSquareRootScheduler, _load_steps)


class RandomStates:
    """The states of all random number generators, for a Checkpointer to save and recover.

    Each process of a distributed run has its own states. A process that the saved run did not have draws others.

    Example
    -------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "random_states.ckpt"
    >>> RandomStates().save(path)
    >>> number = torch.rand(1), np.random.rand(), random.random()
    >>> RandomStates().load(path, end_of_epoch=True)
    >>> number == (torch.rand(1), np.random.rand(), random.random())
    True
    """

    @mark_as_saver
    def save(self, path):
        """Write the states to a file that ``torch.load`` with ``weights_only`` can read."""
        name, keys, position, has_gauss, gauss = np.random.get_state()
        states = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
            "python": random.getstate(),
        }
        torch.save(states, self._of_this_process(path))

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Restore the states from a file."""
        del end_of_epoch  # the same within an epoch and at its end
        own = self._of_this_process(path)
        is_known = own.exists()
        states = torch.load(own if is_known else path)
        torch.set_rng_state(states["torch"])
        if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        random.setstate(states["python"])
        if not is_known:  # there are more processes now; each draws other numbers
            seed_everything(int(torch.randint(2**31, ())) + process_number(), verbose=False)

    @staticmethod
    def _of_this_process(path):
        rank = process_number()
        # with another suffix, a Checkpointer does not treat the file as a recoverable
        return path.with_suffix(f".rank{rank}") if rank else path


register_checkpoint_hooks(RandomStates, save_on_main_only=False)


def _processes():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
