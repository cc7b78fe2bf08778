"""Publishing models and loading them, with a local server in place of Hugging Face's."""

import json
import shutil

import pytest
import torch
from hub import TOKEN, Hub, client, sentence
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tiny import make_model

from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.publish import _card
from speechbrain_ext.model_folder.fetch import download
from speechbrain_ext.utils.errors import UserError

FILES = {"README.md", "asr.safetensors", "config.json", "hyperparams.yaml", "tokenizer.ckpt"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A server, two versions of a model in the folders old and new, and the text of a file with each."""
    folder = tmp_path_factory.mktemp("publish")
    make_model(folder, decoder_layers=0)
    old, new = folder / "model", folder / "new"
    shutil.copytree(old, new)
    weights = load_file(old / "asr.safetensors")
    torch.manual_seed(1)
    save_file(
        {name: value + 0.5 * torch.randn(value.shape) if value.is_floating_point() else value for name, value in weights.items()},
        new / "asr.safetensors",
    )
    (old / "secret.txt").write_text("of no concern to others")
    (old / "checkpoints").mkdir()
    texts = [load_model(path, "cpu").transcribe_file(str(folder / "long.flac")) for path in (old, new)]
    assert texts[0] != texts[1]
    with Hub() as hub:
        hub.make("ann/bert")
        hub.commit("ann/bert", "main", {"config.json": b"{}", "pytorch_model.bin": b""})
        yield hub, folder, texts


@pytest.fixture(scope="module")
def published(world):
    """The output of the commands that publish."""
    hub, folder, _ = world
    (folder / "incomplete").mkdir()
    shutil.copytree(folder / "new", folder / "damaged")
    (folder / "damaged" / "asr.safetensors").write_bytes(b"no weights")
    commands = {
        "first": ["model", "ann/speech"],
        "second": ["new", "ann/speech", "--message", "Better", "--license", "cc-by-4.0"],
        "branch": ["model", "ann/speech", "--revision", "trial"],
        "private": ["model", "ann/secret", "--private"],
        "public": ["model", "ann/speech", "--private"],
        "other": ["model", "ann/bert"],
        "foreign": ["model", "bob/speech"],
        "license": ["model", "ann/speech", "--license", "no-such-license"],
        "incomplete": ["incomplete", "ann/incomplete"],
        "damaged": ["damaged", "ann/damaged"],
        "short": ["model", "speech"],
        "bad": ["model", "ann/a--b"],
    }
    argv = [["publish", "--model", folder / command[0], *command[1:]] for command in commands.values()]
    return dict(zip(commands, client(folder / "home", hub.url, *argv, HF_TOKEN=TOKEN), strict=True))


@pytest.fixture(scope="module")
def commits(published):
    """The commits of the first and the second version."""
    return [published[name][1].strip().rsplit("/", 1)[1] for name in ("first", "second")]


def test_a_model_is_one_commit_of_its_files(world, published, commits):
    hub, folder, _ = world
    repository = hub.repositories["ann/speech"]
    initial, *made = repository["commits"].items()
    assert [commit for commit, _ in made[:2]] == commits and repository["branches"]["main"] == commits[1]
    assert published["first"][:2] == [0, f"{hub.url}/ann/speech/tree/{commits[0]}\n"]
    files = repository["commits"][commits[0]]
    assert set(files) == FILES | {".gitattributes"}
    for name in FILES - {"README.md"}:
        assert files[name] == (folder / "model" / name).read_bytes()
    assert len(made) == 3 and repository["branches"]["trial"] == made[2][0]
    assert hub.repositories["ann/secret"]["private"] and not repository["private"]


def test_the_card_has_the_name_and_the_license_asked_for(world, commits):
    hub, *_ = world
    first, second = (hub.repositories["ann/speech"]["commits"][commit]["README.md"].decode() for commit in commits)
    assert 'load_model("ann/speech")' in first and "license:" not in first
    assert second == first.replace("---\n", "---\nlicense: cc-by-4.0\n", 1)


def test_what_cannot_be_published_is_told_in_one_sentence(world, published):
    hub, *_ = world
    sentence(published["public"], 1, "ann/speech exists and is public")
    sentence(published["other"], 1, "another kind of model", "config.json")
    sentence(published["foreign"], 1, "may not write to bob/speech")
    sentence(published["license"], 1, '"license" must be one of')
    sentence(published["incomplete"], 2, "no complete model folder because it has no hyperparams.yaml")
    sentence(published["damaged"], 2, "damaged")
    sentence(published["short"], 2, "give user/model")
    sentence(published["bad"], 2, "ann/a--b")
    assert set(hub.repositories) == {"ann/bert", "ann/speech", "ann/secret"}
    assert set(hub.repositories["ann/bert"]["commits"].popitem()[1]) == {".gitattributes", "config.json", "pytorch_model.bin"}


def test_without_permission(world, published):
    hub, folder, _ = world
    publish = ["publish", "--model", folder / "model", "ann/speech"]
    (result,) = client(folder / "home", hub.url, publish)
    sentence(result, 1, "no token", "hf auth login")
    (result,) = client(folder / "home", hub.url, publish, HF_TOKEN="hf_wrong")
    sentence(result, 1, "refuses the token")


def test_loading_from_an_empty_cache_then_offline(world, commits, published):
    hub, folder, (old, new) = world
    text = (folder / "new" / "hyperparams.yaml").read_text()
    hub.make("ann/trap")
    files = {name: (folder / "new" / name).read_bytes() for name in FILES}
    hub.commit("ann/trap", "main", files | {"hyperparams.yaml": f"{text}\ntrap: !apply:os.mkdir [executed]\n".encode()})
    file = folder / "long.flac"
    pinned, latest, branch = ["--revision", commits[0]], [], ["--revision", "trial"]
    versions = [
        ["transcribe", "--model", "ann/speech", file, "--device", "cpu", *version] for version in (pinned, latest, branch)
    ]
    others = [
        ["transcribe", "--model", *words, file, "--device", "cpu"] for words in (["ann/gone"], ["ann/secret"], ["ann/trap"])
    ]
    wrong = ["transcribe", "--model", "ann/speech", file, "--revision", "no-such"]
    local = ["transcribe", "--model", folder / "new", file, "--revision", commits[0]]
    results = client(folder / "cache", hub.url, *versions, *others, wrong, local, ["speechbrain", "ann/speech", file])
    for result, text in zip(results, (old, new, old), strict=False):
        assert result[:2] == [0, f"{file}\t{text}\n"], result
    sentence(results[3], 2, "ann/gone is neither a folder nor a model on Hugging Face")
    sentence(results[4], 2, "ann/secret", "hf auth login")
    sentence(results[5], 2, "ann/trap has !apply:os.mkdir", "trust=True")
    sentence(results[6], 2, "no revision no-such")
    sentence(results[7], 2, "is a folder")
    assert results[8][1].split() == new.split()
    assert not list(folder.rglob("executed"))

    absent = ["transcribe", "--model", "ann/secret", file]
    trust = ["trust", "ann/trap"]
    results = client(folder / "cache", hub.url, *versions, absent, trust, HF_HUB_OFFLINE="1")
    for result, text in zip(results, (old, new, old), strict=False):
        assert result[:2] == [0, f"{file}\t{text}\n"], result
    sentence(results[3], 2, "ann/secret", "HF_HUB_OFFLINE")
    assert (folder / "executed").is_dir()


def test_a_server_that_does_not_answer(world):
    _, folder, _ = world
    commands = [
        ["publish", "--model", folder / "model", "ann/speech"],
        ["transcribe", "--model", "ann/speech", folder / "long.flac"],
    ]
    publish, transcribe = client(folder / "nothing", "http://127.0.0.1:9", *commands, HF_TOKEN=TOKEN)
    sentence(publish, 1, "http://127.0.0.1:9 cannot be reached")
    sentence(transcribe, 2, "ann/speech", "cannot be reached")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/cache/hub"), OSError(28, "No space left on device")]
)
def test_a_cache_that_cannot_be_written(error, monkeypatch):
    """It is not said to be the network."""

    def failing(*args, **keys):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    with pytest.raises(UserError, match=f"cannot be written: {error.strerror}; set HF_HOME to another folder"):
        download("ann/speech", None, ["config.json"])


@pytest.mark.parametrize(
    "broken", [errors.HTTPError("403 Forbidden"), json.JSONDecodeError("Expecting value", "<html>", 0), RuntimeError("closed")]
)
def test_a_broken_connection_uses_the_cache(broken, monkeypatch):
    """Of any kind: a proxy that refuses, a page of a hotel, a server that hangs up."""
    kept = []

    def failing(source, local_files_only=False, **keys):
        if local_files_only and kept:
            return kept[0]
        raise errors.LocalEntryNotFoundError("not in the cache") if local_files_only else broken

    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    with pytest.raises(FileNotFoundError, match="is neither a folder nor in the cache, and Hugging Face cannot be reached [(]"):
        download("ann/speech", None, ["config.json"])
    kept.append("/cache/commit")
    assert str(download("ann/speech", None, ["config.json"])) == "/cache/commit"


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense:\n- mit\n- apache-2.0\nlanguage: en\n---\ntext\n", "---\nlicense: mit\nlanguage: en\n---\ntext\n"),
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: x\n---\ntext\n", "---\nlicense: mit\n---\ntext\n"),
        ("---\nlicense: >\n  mit\n\n  x\ntags: [a]\n---\ntext\n", "---\nlicense: mit\ntags: [a]\n---\ntext\n"),
        ("\ufeff\n--- \nlanguage: en\n---\ntext\n", "---\nlicense: mit\nlanguage: en\n---\ntext\n"),
        ("text\n---\nmore\n", "---\nlicense: mit\n---\ntext\n---\nmore\n"),
        ("---\nlicense: mit\ntext\n", "have no end; add a line with ---"),
        (b"caf\xe9", "is not UTF-8"),
    ],
)
def test_a_card_that_was_edited(card, expected, tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(card if isinstance(card, bytes) else card.encode())
    if expected.startswith("---"):
        assert _card(path, "ann/speech", "mit") == expected
        return
    with pytest.raises(UserError, match=expected):
        _card(path, "ann/speech", "mit")
