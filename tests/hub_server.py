"""A small server that speaks the Hub's HTTP API, to test the real huggingface_hub client.

Repositories live in memory. What differs from the Hub: large files go through git-LFS and never
through Xet, there is one branch, and ranges are ignored (the client then starts again).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

USER, WRITER, READER = "you", "hf_writer", "hf_reader"
SERVER_ERROR = "Internal Error - We're working hard to fix this as soon as possible!"


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @cached_property
    def oid(self) -> str:
        """What the client compares its files with: sha256 of LFS files, git's blob id of others."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    summary: str
    files: dict[str, File]


ATTRIBUTES = File(b"*.safetensors filter=lfs\n", lfs=False)
FIRST = Commit("0" * 40, "initial commit", {".gitattributes": ATTRIBUTES})


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=lambda: [FIRST])

    def at(self, revision: str) -> Commit:
        if revision == "main":
            return self.commits[-1]
        for commit in self.commits:
            if commit.oid == revision:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves at `hub.url`.

    Attributes:
        rights: what a token may do, "write" or "read"; any other token is refused.
        repositories: by repository id, with "datasets/" or "spaces/" before it, each with its log
            of commits.
        uploads: sha256 of the large files that were uploaded, each time.
        lfs_suffixes: of the files that have to be uploaded through git-LFS.
        fail_next: faults as (method, part of the path, status); each spoils the next request that
            it fits. A status of None drops the connection without an answer, after half of what was
            to be received.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.rights = {WRITER: "write", READER: "read"}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.lfs_suffixes: tuple[str, ...] = (".safetensors",)
        self.fail_next: list[tuple[str, str, int | None]] = []
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path).replace("/api/models/", "/api/", 1)
        length = int(self.headers.get("Content-Length", 0))
        with self.server.lock:
            waiting = self.server.fail_next
            fault = next((f for f in waiting if f[0] == self.command and f[1] in path), None)
            if fault:
                waiting.remove(fault)
        if fault and fault[2] is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        # The body is read before anything is answered: what is left of it would be taken for the
        # next request.
        self.body = self.rfile.read(length)
        try:
            if fault:
                raise Refusal(fault[2], SERVER_ERROR)
            for method, pattern, answer in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    return answer(self, *match.groups())
            raise Refusal(404, f"Sorry, we can't find {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            self.send({"error": str(refusal)}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_) -> None:
        """Keeps the tests' output clean."""

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def right(self) -> str | None:
        """What the caller may do; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.rights:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.rights.get(token)

    def demand_write(self) -> None:
        right = self.right()
        if right is None:
            raise Refusal(401, "Invalid credentials")
        if right != "write":
            raise Refusal(403, "pass a token with write access")

    def repository(self, repo_id: str) -> Repository:
        right, repository = self.right(), self.server.repositories.get(repo_id)
        if repository is None or (repository.private and right is None):
            # The Hub does not tell strangers which private repositories there are.
            raise Refusal(404 if right else 401, "Repository not found", "RepoNotFound")
        return repository

    def whoami(self) -> None:
        if self.right() is None:
            raise Refusal(401, "Invalid credentials")
        self.send({"type": "user", "name": USER, "auth": {"accessToken": {"role": self.right()}}})

    def validate_yaml(self) -> None:
        self.send({"errors": [], "warnings": []})

    def create(self) -> None:
        self.demand_write()
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        key = repo_id if kind == "model" else f"{kind}s/{repo_id}"
        url = f"{self.server.url}/{key}"
        if not repo_id.startswith(f"{USER}/"):
            raise Refusal(403, f"You don't have the rights to create {repo_id}")
        if key in self.server.repositories:
            return self.send({"error": f"You already created this {kind} repo", "url": url}, 409)
        self.server.repositories[key] = Repository(private=wanted.get("visibility") == "private")
        self.send({"url": url, "name": repo_id})

    def preupload(self, repo_id: str, revision: str) -> None:
        self.demand_write()
        stored, answers = self.repository(repo_id).at(revision).files, []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if path.endswith(self.server.lfs_suffixes) else "regular"
            oid = stored[path].oid if path in stored else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.demand_write()
        self.repository(repo_id)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.server.objects:
                wanted["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
        self.send({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        # Needs no token, as on the Hub: the address itself is the permission, for this one content.
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content does not match its sha256")
        self.server.objects[oid] = self.body
        self.server.uploads.append(oid)
        self.send({})

    def commit(self, repo_id: str, revision: str) -> None:
        self.demand_write()
        repository = self.repository(repo_id)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        with self.server.lock:
            if header["value"].get("parentCommit") != repository.at(revision).oid:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.at(revision).files)
            for key, value in ((operation["key"], operation["value"]) for operation in operations):
                if key == "file":
                    files[value["path"]] = File(b64decode(value["content"]), lfs=False)
                elif key == "lfsFile" and value["oid"] in self.server.objects:
                    files[value["path"]] = File(self.server.objects[value["oid"]], lfs=True)
                elif key == "deletedFile" and value["path"] in files:
                    del files[value["path"]]
                else:
                    raise Refusal(400, f"Cannot commit {key} {value['path']}")
            oid = hashlib.sha1(b"%d" % len(repository.commits) + self.body).hexdigest()
            repository.commits.append(Commit(oid, header["value"]["summary"], files))
        url = f"{self.server.url}/{repo_id}/commit/{oid}"
        self.send({"success": True, "commitOid": oid, "commitUrl": url})

    def info(self, repo_id: str, revision: str | None) -> None:
        repository = self.repository(repo_id)
        commit = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        own_id = repo_id.removeprefix("datasets/").removeprefix("spaces/")
        told = {"id": own_id, "sha": commit.oid, "private": repository.private, "tags": []}
        self.send(told | {"siblings": siblings})

    def commits(self, repo_id: str, revision: str) -> None:
        self.repository(repo_id).at(revision)
        log = reversed(self.repository(repo_id).commits)
        same = {"message": "", "date": "2026-01-01T00:00:00.000Z"}
        same["authors"] = [{"user": USER, "avatar": ""}]
        self.send([same | {"id": each.oid, "title": each.summary} for each in log])

    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        entries = []
        for path, file in self.repository(repo_id).at(revision).files.items():
            if folder is None or path.startswith(f"{folder}/"):
                known = {"size": len(file.content), "oid": file.oid}
                entries.append({"type": "file", "path": path, **known})
                if file.lfs:
                    entries[-1]["lfs"] = known | {"pointerSize": 134}
        if folder is not None and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.send(entries)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.repository(repo_id).at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        self.send(file.content, 200, {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit.oid})


ID = r"((?:datasets/|spaces/)?[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/{ID}/preupload/(.+)", Handler.preupload),
    ("POST", f"/{ID}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.lfs_upload),
    ("POST", f"/api/{ID}/commit/(.+)", Handler.commit),
    ("GET", f"/api/{ID}/commits/(.+)", Handler.commits),
    ("GET", f"/api/{ID}(?:/revision/(.+))?", Handler.info),
    ("GET", f"/api/{ID}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    (("HEAD", "GET"), f"/{ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]
