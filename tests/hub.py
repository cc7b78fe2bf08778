"""A local server in place of Hugging Face's, with the requests of huggingface_hub to create, fill and read repositories."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN, USER = "hf_writer", "ann"


# Runs several commands in one process, because imports take longer; endpoint and cache are fixed when a process starts.
CLIENT = """
import contextlib, io, json, sys, traceback
from speechbrain_ext import cli

def speechbrain(source, file):
    from speechbrain.inference.ASR import EncoderASR
    print(EncoderASR.from_hparams(source=source, run_opts={"device": "cpu"}).transcribe_file(file))
    return 0

def trust(source):
    from speechbrain_ext.inference import load_model
    load_model(source, "cpu", trust=True)
    return 0

results = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            own = {"speechbrain": speechbrain, "trust": trust}.get(argv[0])
            status = own(*argv[1:]) if own else cli.main(argv)
        except Exception:
            status = traceback.print_exc()
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


class Hub:
    """A server on a free port of this machine; a context manager.

    Attributes
    ----------
    url : str
        Its address.
    repositories : dict
        By id: ``private``, ``branches`` (name -> commit) and ``commits`` (commit -> path -> content), in order.
    blobs : dict
        Contents of large files, by SHA-256.
    """

    def __init__(self):
        self.repositories, self.blobs = {}, {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def make(self, repo_id, private=False):
        self.repositories[repo_id] = {"private": private, "branches": {}, "commits": {}}
        self.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, repo_id, branch, files):
        repository = self.repositories[repo_id]
        files = {**repository["commits"].get(repository["branches"].get(branch), {}), **files}
        commit = hashlib.sha1(f"{repo_id}{len(repository['commits'])}".encode()).hexdigest()
        repository["commits"][commit] = files
        repository["branches"][branch] = commit
        return commit


class _Refusal(Exception):
    def __init__(self, status, code="", message=""):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _serve(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        try:
            for methods, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods:
                    return answer(self, *match.groups())
            raise _Refusal(404)
        except _Refusal as refusal:
            self._send(refusal.status, {"error": refusal.headers["X-Error-Message"]}, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _send(self, status, content, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _knows_user(self):
        given = self.headers.get("Authorization")
        if given and given != f"Bearer {TOKEN}":
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return bool(given)

    def _writes(self, owner):
        if not self._knows_user():
            raise _Refusal(401, message="Invalid username or password.")
        if owner != USER:
            raise _Refusal(403, message=f"You don't have the rights to create a model under the namespace {owner}")

    def _repository(self, repo_id):
        repository = self.hub.repositories.get(repo_id)
        if repository is None or repository["private"] and not self._knows_user():
            raise _Refusal(404 if self._knows_user() else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit_of(self, repo_id, revision):
        repository = self._repository(repo_id)
        commit = repository["branches"].get(revision, revision)
        if commit not in repository["commits"]:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository["commits"][commit]

    # ------------------------------------------------------------------ writing

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        self._writes(repo_id.split("/")[0])
        known = repo_id in self.hub.repositories
        if not known:
            self.hub.make(repo_id, asked.get("private", asked.get("visibility") == "private"))  # by the client's version
        self._send(409 if known else 200, {"url": f"{self.hub.url}/{repo_id}"})

    def branch(self, repo_id, name):
        self._writes(repo_id.split("/")[0])
        branches = self._repository(repo_id)["branches"]
        known = name in branches
        branches.setdefault(name, branches["main"])
        self._send(409 if known else 201, {})

    def validate(self):
        bad = "license: no-such-license" in json.loads(self.body)["content"]
        self._send(
            400 if bad else 200, {"errors": [{"message": '"license" must be one of [...]'}] if bad else [], "warnings": []}
        )

    def preupload(self, repo_id, revision):
        self._writes(repo_id.split("/")[0])
        self._commit_of(repo_id, revision)
        names = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if name.endswith((".safetensors", ".ckpt")) else "regular" for name in names]
        files = [{"path": n, "uploadMode": m, "shouldIgnore": False, "oid": None} for n, m in zip(names, modes, strict=True)]
        self._send(200, {"files": files})

    def batch(self, repo_id):
        self._writes(repo_id.split("/")[0])
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(self.body)["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                places = {"upload": f"/blobs/{item['oid']}", "verify": "/blobs/verify"}
                item["actions"] = {name: {"href": self.hub.url + place} for name, place in places.items()}
        self._send(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, digest):
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.hub.blobs[digest] = self.body
        self._send(200, {})

    def verify(self):
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise _Refusal(404)
        self._send(200, {})

    def commit(self, repo_id, revision):
        self._writes(repo_id.split("/")[0])
        self._commit_of(repo_id, revision)
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.commit(repo_id, revision, files)
        self._send(200, {"success": True, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    # ------------------------------------------------------------------ reading

    def info(self, repo_id, revision=None):
        commit, files = self._commit_of(repo_id, revision or "main")
        siblings = [{"rfilename": name} for name in files]
        private = self._repository(repo_id)["private"]
        self._send(200, {"id": repo_id, "sha": commit, "private": private, "siblings": siblings, "tags": []})

    def tree(self, repo_id, revision):
        _, files = self._commit_of(repo_id, revision)
        listed = []
        for name, content in files.items():
            listed.append({"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()})
            digest = hashlib.sha256(content).hexdigest()
            if digest in self.hub.blobs:
                listed[-1]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        self._send(200, listed)

    def resolve(self, repo_id, revision, name):
        commit, files = self._commit_of(repo_id, revision)
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            self._send(404, {}, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        digest = hashlib.sha256(files[name]).hexdigest()
        if digest in self.hub.blobs:
            # Redirect to another host, as Hugging Face does; for a file's metadata, clients do not follow it
            place = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/blobs/{digest}"
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(files[name]), "Location": place}
            self._send(302, b"", headers)
        else:
            self._send(200, files[name], {**headers, "ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'})

    def get_blob(self, digest):
        self._send(200, self.hub.blobs[digest], {"ETag": f'"{digest}"'})


_ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("POST",), "/api/models/([^/]+/[^/]+)/branch/(.+)", _Handler.branch),
    (("POST",), "/api/models/([^/]+/[^/]+)/preupload/(.+)", _Handler.preupload),
    (("POST",), "/api/models/([^/]+/[^/]+)/commit/(.+)", _Handler.commit),
    (("POST",), r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (("POST",), "/blobs/verify", _Handler.verify),
    (("PUT",), "/blobs/([0-9a-f]{64})", _Handler.put_blob),
    (("GET",), "/api/models/([^/]+/[^/]+)/revision/(.+)", _Handler.info),
    (("GET",), "/api/models/([^/]+/[^/]+)/tree/(.+)", _Handler.tree),
    (("GET",), "/api/models/([^/]+/[^/]+)", _Handler.info),
    (("GET", "HEAD"), "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
    (("GET", "HEAD"), "/blobs/([0-9a-f]{64})", _Handler.get_blob),
]


def client(home, url, *commands, **variables):
    """Exit status, standard output and standard error of each command."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    here = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {**kept, **here, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    argv = [sys.executable, "-c", CLIENT, json.dumps([list(map(str, command)) for command in commands])]
    run = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=home.parent)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) == len(commands)
    for status, _, error in results:
        assert status is not None and "Traceback" not in error, error[-3000:]
    return results


def sentence(result, status, *words):
    """Check that a command failed with one sentence that contains these words."""
    assert result[0] == status and result[1] == "", result
    (line,) = [line for line in result[2].splitlines() if line.startswith("speechbrain_ext: ")]
    assert all(word in line for word in words), line
