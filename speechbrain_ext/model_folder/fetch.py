"""Find a model that is no folder of the user's: that of the package, or one of Hugging Face."""

import contextlib
import errno
import json
import os
import re
from pathlib import Path

from speechbrain_ext.model_folder import HYPERPARAMS
from speechbrain_ext.utils.errors import UserError, one_line

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
NOT_WRITTEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Errors of a cache that cannot be written."""
ENGLISH = "english"
"""Name of the small English model that comes with the package."""
SHIPPED = Path(__file__).resolve().parents[1] / "models"
"""The folder that holds it."""


def is_shipped(source):
    """Whether a name is that of the package's model, and no file or model folder of the user has it.

    Example
    -------
    >>> is_shipped("english"), is_shipped("ann/english")
    (True, False)
    """
    return source == ENGLISH and not any(path.is_file() for path in (Path(source), Path(source) / HYPERPARAMS))


def split_revision(source):
    """The name of a repository and its revision or None, from ``user/model`` or ``user/model@revision``.

    Example
    -------
    >>> split_revision("ann/lm@main"), split_revision("ann/lm")
    (('ann/lm', 'main'), ('ann/lm', None))
    """
    repository, _, revision = source.partition("@")
    return repository, revision or None


def download(
    source, revision, files, missing="There is no model folder {}; give the folder 'pretrained' of a training run, or english."
):
    """Find the model of the package, or fetch a commit of one of Hugging Face.

    Arguments
    ---------
    source : str
        The name of a repository, ``user/model``, or of the package's model, ``english``.
    revision : str, optional
        A commit, tag or branch; by default the latest commit.
    files : sequence of str
        Files to fetch, as names or patterns such as ``*.nemo``.
    missing : str
        The message for a name that is not that of a repository.

    Returns
    -------
    pathlib.Path
        The folder. In Hugging Face's cache, its name is the commit.

    Raises
    ------
    FileNotFoundError
        If there is no such model or revision, or it is not in the cache and Hugging Face cannot be reached.
    UserError
        If a revision is given for the model of the package, or the cache cannot be written.

    Example
    -------
    >>> download("/no/such/folder", None, [])
    Traceback (most recent call last):
    FileNotFoundError: There is no model folder /no/such/folder; give the folder 'pretrained' of a training run, or english.
    """
    if is_shipped(source):
        if revision is not None:
            raise UserError(f"{source} comes with the package and has no revision {revision}; leave the revision out.")
        return SHIPPED / source

    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if not HUB_ID.fullmatch(source):
        raise FileNotFoundError(missing.format(source or "''"))
    keys = {"revision": revision, "allow_patterns": list(files)}
    try:
        return Path(snapshot_download(source, **keys))
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"The model {source} has no revision {revision}; give a commit, tag or branch of it.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder nor a model on Hugging Face that you may read; if it is private, run hf auth login."
        ) from error
    # A proxy's page is no JSON, and an interrupted download may be a RuntimeError
    except (HTTPError, OSError, json.JSONDecodeError, RuntimeError) as error:
        if getattr(error, "errno", None) in NOT_WRITTEN:
            place = error.filename or os.path.dirname(constants.HF_HUB_CACHE)
            raise UserError(f"{place} cannot be written: {os.strerror(error.errno)}; set HF_HOME to another folder.") from error
        with contextlib.suppress(OSError):  # also if the model is not in the cache
            return Path(snapshot_download(source, **keys, local_files_only=True))
        cause = "" if isinstance(error, LocalEntryNotFoundError) else f" ({one_line(error, 100)})"
        version = f"{source} at revision {revision}" if revision else source
        raise FileNotFoundError(
            f"{version} is neither a folder nor in the cache, and Hugging Face cannot be reached{cause}; load it once with a "
            "network connection and without HF_HUB_OFFLINE."
        ) from error
