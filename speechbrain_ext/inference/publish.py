"""Upload of a trained model to Hugging Face: the files of its folder as one commit."""

import logging
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from speechbrain_ext.inference.load import load_model
from speechbrain_ext.model_folder import CARD, FILES, HYPERPARAMS
from speechbrain_ext.model_folder.build import Refused, parse
from speechbrain_ext.model_folder.card import HERE
from speechbrain_ext.model_folder.fetch import HUB_ID
from speechbrain_ext.utils.errors import UserError, UserRuntimeError, one_line

logger = logging.getLogger(__name__)


class PublishError(UserRuntimeError):
    """Hugging Face did not accept the model; the message is one sentence."""


def publish(folder, repo_id, private=False, revision=None, message=None, license=None, trust=False):
    """Check that a trained model loads, and upload it.

    Only the model's files are sent, all in one commit; other files in the folder are ignored. The token is that of
    ``hf auth login``, or the environment variable HF_TOKEN.

    Arguments
    ---------
    folder : str
        A model folder that training wrote.
    repo_id : str
        The repository, as ``user/model``; created if it is missing.
    private : bool
        Whether only its owner may read it.
    revision : str, optional
        The branch, created if it is missing; by default ``main``.
    message : str, optional
        Message of the commit.
    license : str, optional
        Licence to write into the model card; by default the card keeps its licence, or has none.
    trust : bool
        As in :func:`speechbrain_ext.inference.load_model`; users of the model will need it as well.

    Returns
    -------
    str
        The URL of the commit; its last part is a ``revision`` for ``load_model``.

    Raises
    ------
    FileNotFoundError, RuntimeError
        If the folder is not a complete model folder, or does not load.
    ValueError
        If ``repo_id`` or ``license`` is not well formed, or the folder holds no speech recogniser.
    PublishError
        If there is no token, the server refuses it or cannot be reached, or the repository holds another kind of model.

    Example
    -------
    >>> publish("/no/such/folder", "model")
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: The repository is called 'model'; give user/model.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"The repository name '{repo_id}' is not valid: {error}") from error
    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"The repository is called '{repo_id}'; give user/model.")
    if license is not None and not re.fullmatch(r"[\w.-]+", license):
        raise UserError(f"The license is '{license}'; give one of Hugging Face's identifiers, such as cc-by-4.0.")
    folder = Path(folder)
    for name in (*FILES, CARD):
        if not (folder / name).is_file():
            remedy = "run its training command again to write it" if folder.is_dir() else "give the folder of a model"
            raise FileNotFoundError(f"{folder} is no complete model folder because it has no {name}; {remedy}.")
    load_model(folder, "cpu", trust=trust)
    if trust:
        try:
            parse((folder / HYPERPARAMS).read_text(encoding="utf-8"))
        except Refused as error:
            logger.warning("Loading this model will need trust=True, because its %s has %s.", HYPERPARAMS, error)

    token = get_token()
    if token is None:
        raise PublishError("There is no token for Hugging Face; run hf auth login, or set HF_TOKEN.")
    api = HfApi(token=token)
    files = [CommitOperationAdd(name, str(folder / name)) for name in FILES]
    files.append(CommitOperationAdd(CARD, _card(folder / CARD, repo_id, license).encode()))
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        _check_repository(api.model_info(repo_id), private)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(repo_id, files, commit_message=message or "Upload a trained model", revision=revision)
    except HfHubHTTPError as error:
        raise PublishError(_refusal(error, repo_id)) from error
    except OfflineModeIsEnabled as error:
        raise PublishError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it.") from error
    except (HTTPError, ConnectionError) as error:
        raise PublishError(f"{api.endpoint} cannot be reached ({error}); check the network and publish again.") from error
    except (ValueError, RuntimeError, OSError) as error:  # refused metadata, or an interrupted upload
        cause = one_line(error.__cause__ or error)
        raise PublishError(f"The upload to {repo_id} failed: {cause}") from error
    return f"{api.endpoint}/{repo_id}/tree/{commit.oid}"


def _check_repository(info, private):
    """Refuse, before the upload, a repository with another kind of model, or a public one for a private model."""
    if private and not info.private:
        raise PublishError(f"{info.id} exists and is public; make it private in its settings, or give another name.")
    there = {file.rfilename for file in info.siblings or ()} - {".gitattributes", ".gitignore", "LICENSE", CARD}
    if there and HYPERPARAMS not in there:
        raise PublishError(
            f"{info.id} exists and holds another kind of model, with {sorted(there)[0]} and no hyperparams.yaml; give another "
            "name."
        )


def _card(path, repo_id, license):
    """The model card with the repository's name in its commands and, if given, the licence."""
    try:
        text = path.read_text(encoding="utf-8-sig").replace(HERE, repo_id)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({one_line(error, 100)}); save it as UTF-8.") from error
    if license is None:
        return text
    head, rest = "", text
    begin = r"\s*---[ \t]*\n"
    if re.match(begin, text):
        metadata = re.match(begin + r"(.*?)^---[ \t]*(?:\n|\Z)(.*)", text, re.DOTALL | re.MULTILINE)
        if metadata is None:
            raise UserError(f"The metadata at the start of {path} have no end; add a line with ---.")
        head, rest = metadata.groups()
    # A key with the lines of its value, if that is a list or text of several lines
    head = re.sub(r"^license(_name|_link)?:.*\n(\n*[ -].*\n)*", "", head, flags=re.MULTILINE)
    return f"---\nlicense: {license}\n{head}---\n{rest}"


def _refusal(error, repo_id):
    status = error.response.status_code
    if status == 401:
        return f"Hugging Face refuses the token for {repo_id}; run hf auth login."
    if status == 403:
        return f"The token may not write to {repo_id}; use a token with write permission, and a repository under your own name."
    if status == 404:
        return f"Hugging Face has no repository {repo_id}, or the token may not read it; check the name."
    cause = one_line(error.server_message or error)
    return f"Hugging Face refused the upload to {repo_id} with status {status}: {cause}"
