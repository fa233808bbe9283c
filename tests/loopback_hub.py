# Copyright 2026 The trl-flow authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A Hub in memory on a thread, which the real `huggingface_hub`, `datasets` and `evaluate` talk to.

It knows what a test needs: repositories of the three types with commits, branches and tags, uploads of regular and of
LFS files, downloads, ranges, the file tree. Not pull requests, gating, copies on the server, paging, or Xet.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_metadata import metadata_problems


# What the Hub stores as LFS objects, whatever their size.
LFS = (".safetensors", ".bin", ".pt", ".parquet", ".png", ".jpg", ".arrow")
CUT, HALF = 0, 1  # as faults
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    sha: str
    files: dict[str, bytes]
    message: str


@dataclass
class Repository:
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str, branch: str = "main") -> Commit:
        """A commit with exactly these files, as the head of a branch."""
        parent = self.branches[branch].sha if branch in self.branches else ""
        text = json.dumps([parent, len(self.commits), message, {path: blob_id(files[path]) for path in sorted(files)}])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), files, message)
        self.commits.append(commit)
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag, or a commit's name, which may be short."""
        if revision in self.branches or revision in self.tags:
            return self.branches.get(revision) or self.tags[revision]
        named = [commit for commit in self.commits if len(revision) >= 7 and commit.sha.startswith(revision)]
        return named[0] if named else None


def blob_id(content: bytes) -> str:
    """As git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    """
    A Hub at `url`, for as long as its `with` block lasts. Clients read their Hub's address when they are imported, so
    what talks to it runs in a process of its own: [`LoopbackHub.run`].

    Attributes:
        repositories (`dict[tuple[str, str], Repository]`): By type (`"model"`, `"dataset"`, `"space"`) and id.
        requests (`list[tuple[str, str]]`): Method and path of every request so far.
        fault (`Callable[[str, str], int | None]`): Gets method and path of a request; where it returns a status, the
            request fails with that and has no effect; with `CUT`, the connection ends in the middle of the request, with
            `HALF` in the middle of the answer.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}  # LFS uploads by SHA-256
        self.fault = lambda method, path: None
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.stop()

    def stop(self):
        """From now on nobody answers at the address."""
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_type: str, repo_id: str, files: dict[str, bytes | str], branch: str = "main") -> str:
        """A commit that adds or replaces files; the repository and the branch are made if need be. Returns its sha."""
        with self.lock:
            repository = self.repositories.setdefault((repo_type, repo_id), Repository())
            head = repository.branches.get(branch) or repository.branches.get("main")
            new = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
            return repository.commit({**(head.files if head else {}), **new}, "Add files", branch).sha

    def files(self, repo_type: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision of a repository holds."""
        return self.repositories[repo_type, repo_id].find(revision).files

    def environment(self, home: str) -> dict[str, str]:
        """Environment of a process that uses this Hub, with its cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, script: str, *args: str, env: dict | None = None, cwd=None, check: bool = True):
        """
        Runs Python code in a process that uses this Hub.

        Args:
            script (`str`): Code; its indentation is removed.
            args: Become `sys.argv[1:]`.
            env (`dict`, *optional*): More environment variables. The cache is a fresh folder unless `HF_HOME` says where.
            cwd (`Path`, *optional*): Working directory.
            check (`bool`, *optional*, defaults to `True`): Whether a process that fails is an error.

        Returns:
            `subprocess.CompletedProcess`: With `stdout` and `stderr` as text.
        """
        with tempfile.TemporaryDirectory() as home:
            result = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
                env={**self.environment(home), **(env or {})},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=300,
            )
        assert not check or result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result


class _NotFound(Exception):
    """With the Hub's code for what is missing, from which the client makes its exception."""


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("GET", rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}(/revision/(?P<revision>[^/]+))?", "show"),
    ("GET", rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}/refs", "refs"),
    ("GET", rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}/commits/(?P<revision>[^/]+)", "commits"),
    ("GET", rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
    ("POST", rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}/paths-info/(?P<revision>[^/]+)", "paths"),
    ("POST", rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}/tag/(?P<revision>[^/]+)", "tag"),
    ("POST", r"/.+\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("GET", rf"/((?P<kind>datasets|spaces)/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, url = self.server.hub, urlsplit(self.path)
        with hub.lock:
            hub.requests.append((self.command, url.path))
            status = hub.fault(self.command, url.path)
        if status == CUT:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return None
        self.body, self.query = self._read_body(), parse_qs(url.query)
        self.half = status == HALF
        if status not in (None, HALF):
            return self._send({"error": "fault"}, status)
        method = "GET" if self.command == "HEAD" else self.command
        with hub.lock:
            for wanted, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if wanted == method and match:
                    groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    try:
                        return getattr(self, name)(**groups)
                    except _NotFound as missing:
                        return self._send({"error": f"{missing}"}, 404, {"X-Error-Code": f"{missing}"})
        return self._send({"error": f"the loopback Hub does not know {self.command} {url.path}"}, 404)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, content: bytes | dict | list, status: int = 200, headers: dict | None = None):
        is_file = isinstance(content, bytes)
        content = content if is_file else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_file else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.half else content)
            self.close_connection = self.close_connection or self.half

    def _repository(self, kind: str, repo: str) -> Repository:
        repository = self.server.hub.repositories.get((kind.removesuffix("s"), repo))
        if repository is None or (repository.private and "Authorization" not in self.headers):
            raise _NotFound("RepoNotFound")
        return repository

    def _commit(self, kind: str, repo: str, revision: str) -> Commit:
        commit = self._repository(kind, repo).find(revision)
        if commit is None:
            raise _NotFound("RevisionNotFound")
        return commit

    def whoami(self):
        self._send({"type": "user", "name": "user", "fullname": "User", "orgs": [], "auth": {"accessToken": {}}})

    def validate_yaml(self):
        errors, warnings = metadata_problems(json.loads(self.body)["content"])
        problems = {"errors": errors, "warnings": warnings}
        self._send(
            {name: [{"message": text} for text in texts] for name, texts in problems.items()}, 400 if errors else 200
        )

    def create(self):
        asked = json.loads(self.body)
        key = asked.get("type", "model"), f"{asked.get('organization') or 'user'}/{asked['name']}"
        exists = key in self.server.hub.repositories
        if not exists:
            repository = Repository(private=asked.get("visibility") == "private" or asked.get("private") is True)
            repository.commit({".gitattributes": b""}, "initial commit")
            self.server.hub.repositories[key] = repository
        prefix = "" if key[0] == "model" else f"{key[0]}s/"
        self._send({"url": f"{self.server.hub.url}/{prefix}{key[1]}", "name": key[1]}, 409 if exists else 200)

    def delete(self):
        asked = json.loads(self.body)
        key = asked.get("type", "model"), f"{asked.get('organization') or 'user'}/{asked['name']}"
        if self.server.hub.repositories.pop(key, None) is None:
            raise _NotFound("RepoNotFound")
        self._send({})

    def show(self, kind: str, repo: str, revision: str = "main"):
        commit = self._commit(kind, repo, revision)
        front = re.match(r"---\n(.*?)\n---", commit.files.get("README.md", b"").decode(), re.DOTALL)
        card = yaml.safe_load(front[1]) if front else {}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            siblings = [{**self._entry(path, commit.files[path]), "rfilename": path} for path in sorted(commit.files)]
            for sibling in siblings:
                sibling["blobId"] = sibling["oid"]
                if "lfs" in sibling:
                    sibling["lfs"]["sha256"] = sibling["lfs"]["oid"]
        self._send(
            {
                "id": repo,
                "author": repo.split("/")[0],
                "sha": commit.sha,
                "private": self._repository(kind, repo).private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "lastModified": DATE,
                "createdAt": DATE,
                "tags": card.get("tags", []),
                "library_name": card.get("library_name"),
                "cardData": card,
                "siblings": siblings,
            }
        )

    def refs(self, kind: str, repo: str):
        repository = self._repository(kind, repo)

        def listed(references: dict[str, Commit], prefix: str) -> list[dict]:
            return [{"name": n, "ref": f"{prefix}/{n}", "targetCommit": c.sha} for n, c in references.items()]

        branches, tags = listed(repository.branches, "refs/heads"), listed(repository.tags, "refs/tags")
        self._send({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})

    def commits(self, kind: str, repo: str, revision: str):
        last = self._commit(kind, repo, revision)
        history = self._repository(kind, repo).commits
        history = history[: history.index(last) + 1][::-1]
        self._send([{"id": c.sha, "authors": [], "date": DATE, "title": c.message, "message": ""} for c in history])

    @staticmethod
    def _entry(path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if path.endswith(LFS):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        return entry

    def _entries(self, files: dict[str, bytes]) -> dict[str, dict]:
        """Files and the folders that they make."""
        folders = {path[:end] for path in files for end in (match.start() for match in re.finditer("/", path))}
        entries = {folder: {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders}
        entries |= {path: self._entry(path, content) for path, content in files.items()}
        return dict(sorted(entries.items()))

    def tree(self, kind: str, repo: str, revision: str, path: str = ""):
        entries = self._entries(self._commit(kind, repo, revision).files)
        below = [entry for name, entry in entries.items() if not path or name.startswith(f"{path}/")]
        if path and not below:
            raise _NotFound("EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            depth = path.count("/") + 1 if path else 0
            below = [entry for entry in below if entry["path"].count("/") == depth]
        self._send(below)

    def paths(self, kind: str, repo: str, revision: str):
        entries = self._entries(self._commit(kind, repo, revision).files)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self._send([entries[path] for path in wanted if path in entries])

    def preupload(self, kind: str, repo: str, revision: str):
        self._commit(kind, repo, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [{"path": p, "uploadMode": "lfs" if p.endswith(LFS) else "regular"} for p in paths]
        self._send({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def lfs_batch(self):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            known = asked["oid"] in self.server.hub.objects
            upload = {"upload": {"href": f"{self.server.hub.url}/lfs/{asked['oid']}"}}
            objects.append({**asked, **({} if known else {"actions": upload})})
        self._send({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.hub.objects[oid] = self.body
        self._send({})

    def commit(self, kind: str, repo: str, revision: str):
        files, message = dict(self._commit(kind, repo, revision).files), ""
        for line in filter(None, self.body.splitlines()):
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif operation["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: content for path, content in files.items() if not path.startswith(folder)}
        commit = self._repository(kind, repo).commit(files, message, revision)
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.server.hub.url}/{prefix}{repo}/commit/{commit.sha}"
        self._send({"success": True, "commitOid": commit.sha, "commitUrl": url})

    def branch(self, kind: str, repo: str, name: str):
        repository = self._repository(kind, repo)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        exists = name in repository.branches
        if not exists:
            repository.branches[name] = self._commit(kind, repo, start)
        self._send({}, 409 if exists else 200)

    def tag(self, kind: str, repo: str, revision: str):
        self._repository(kind, repo).tags[json.loads(self.body)["tag"]] = self._commit(kind, repo, revision)
        self._send({})

    def download(self, repo: str, revision: str, path: str, kind: str = "models"):
        commit = self._commit(kind, repo, revision)
        if path not in commit.files:
            return self._send({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha})
        content = commit.files[path]
        entry = self._entry(path, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(content, headers=headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(content[start : end + 1], 206, headers)
