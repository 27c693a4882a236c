"""A Hub on the loopback interface: what huggingface_hub needs to create a model repository, push to it and load from it."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import constants

TOKEN = "hf_TEST"
REPO, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"


@dataclass
class Repository:
    """Commits, oldest first, as (sha, every file at that commit)."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]]
    pulls: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)  # (commit that a pull request is on top of, files)
    headers: list[dict[str, str]] = field(default_factory=list)  # of all commits sent to it: summary, description, parentCommit
    pulled_away: list[list[str]] = field(default_factory=list)  # the paths that each pull request deletes

    def commit(self, changes: dict[str, bytes], deleted: Collection[str] = ()) -> str:
        before = self.commits[-1][1] if self.commits else {}
        files = {name: data for name, data in before.items() if name not in deleted} | changes
        state = json.dumps([len(self.commits), {name: blob_id(data) for name, data in files.items()}])
        self.commits.append((hashlib.sha1(state.encode()).hexdigest(), files))
        return self.commits[-1][0]


class FakeHub(ThreadingHTTPServer):
    """A context manager that serves from memory; ``token`` belongs to the user ``me``, who may read and write everything.

    Attributes:
        repos: Repositories by id.
        validated: Cards that ``validate-yaml`` found right.
        unanswered: Requests that this server does not know.
        seen: Names of the requests, in order.
        broken: Request that fails, and how: ``"500"``, ``"429"``, ``"reset"`` or ``"slow"``.
        before_sending: Called with a request's name when its answer is ready.
    """

    daemon_threads = True

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.endpoint = token, f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repository] = {}
        self.validated: list[str] = []
        self.unanswered: list[str] = []
        self.seen: list[str] = []
        self.broken: tuple[str, str] | None = None
        self.before_sending: Callable[[str], None] = lambda name: None

    def publish(self, repo: str, folder: Path) -> str:
        """Make a public repository of a folder's files, without the network; returns its commit."""
        self.repos[repo] = Repository(private=False, commits=[])
        files = [file for file in folder.rglob("*") if file.is_file()]
        return self.repos[repo].commit({file.relative_to(folder).as_posix(): file.read_bytes() for file in files})

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()


class _Refused(Exception):
    """HTTP status, the Hub's error code, further fields of the answer."""


@contextmanager
def logged_in(monkeypatch) -> Iterator[FakeHub]:
    """A `FakeHub` that this process takes for the Hub, as the user ``me``."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with FakeHub(TOKEN) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        verb, path = self.command.replace("HEAD", "GET"), unquote(urlsplit(self.path).path)
        try:
            for method, pattern, handle in ROUTES:
                if method == verb and (found := re.fullmatch(pattern, path)):
                    name = handle.__name__
                    if self.server.broken and self.server.broken[0] == name:
                        return self.fail(self.server.broken[1])
                    answer = handle(self, body, **found.groupdict())
                    self.server.seen.append(name)
                    self.server.before_sending(name)
                    return self.send(answer)
            self.server.unanswered.append(f"{verb} {path}")
            raise _Refused(404, "NotFound", {})
        except _Refused as refused:
            status, code, fields = refused.args
            self.send({"error": code, **fields}, status, {"X-Error-Code": code})

    def fail(self, how: str):
        if how == "reset":  # a closed connection with nothing to linger for
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if how == "slow":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"{")
            self.wfile.flush()
            return time.sleep(1)
        return self.send({"error": "failing"}, int(how), {"Retry-After": 1} if how == "429" else {})

    do_GET = do_HEAD = do_POST = answer

    def send(self, value, status=200, headers=None):
        if isinstance(value, tuple):
            value, headers = value
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def repository(self, name: str, write: bool = False) -> Repository:
        found = self.server.repos.get(name)
        if found is None or (found.private or write) and not self.is_known():
            raise _Refused(404 if self.is_known() else 401, "RepoNotFound", {})
        return found

    def at(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        for commit in reversed(self.repository(repo).commits):
            if revision in (None, "main", commit[0]):
                return commit
        raise _Refused(404, "RevisionNotFound", {})

    def whoami(self, body):
        if not self.is_known():
            raise _Refused(401, "Unauthorized", {})
        return {"type": "user", "name": "me", "orgs": []}

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked['organization'] or self.whoami(b'')['name']}/{asked['name']}"
        answer = {"url": f"{self.server.endpoint}/{repo}", "id": repo, "name": repo}
        if repo in self.server.repos:
            raise _Refused(409, "RepoExists", answer)
        self.server.repos[repo] = Repository(asked.get("visibility") == "private", [])
        self.server.repos[repo].commit({})  # the Hub's own first one, here without its .gitattributes
        return answer

    def validate(self, body):
        card = json.loads(body)["content"]
        if errors := card_errors(card):
            raise _Refused(400, "InvalidCard", {"errors": [{"message": error} for error in errors]})
        self.server.validated.append(card)
        return {"errors": [], "warnings": []}

    def preupload(self, body, repo):
        self.repository(repo, write=True)
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}

    def commit(self, body, repo):
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        files = [line["value"] for line in lines if line["key"] == "file"]
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        contents = {file["path"]: base64.b64decode(file["content"]) for file in files}
        answer, place = {"success": True}, f"{self.server.endpoint}/{repo}"
        as_pull = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
        found = self.repository(repo, write=not as_pull)
        parent, there = self.at(repo, header.get("parentCommit") if as_pull else None)
        if header.get("parentCommit") not in (None, parent):
            raise _Refused(412, "PreconditionFailed", {})
        if missing := [path for path in deleted if path not in there]:
            raise _Refused(404, "EntryNotFound", {"error": f"A file with this name doesn't exist: {missing[0]}"})
        found.headers.append(header)
        if as_pull:
            found.pulls.append((header["parentCommit"], contents))
            found.pulled_away.append(deleted)
            answer["pullRequestUrl"], sha = f"{place}/discussions/{len(found.pulls)}", "1" * 40
        else:
            sha = found.commit(contents, deleted)
        return answer | {"commitOid": sha, "commitUrl": f"{place}/commit/{sha}"}

    def info(self, body, repo, revision=None):
        sha, files = self.at(repo, revision)
        private = self.server.repos[repo].private
        found = {"id": repo, "sha": sha, "private": private, "siblings": [{"rfilename": name} for name in files]}
        if "securityStatus" in parse_qs(urlsplit(self.path).query):
            found["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
        return found

    def tree(self, body, repo, revision):
        files = self.at(repo, revision)[1].items()
        return [{"type": "file", "path": name, "size": len(data), "oid": blob_id(data)} for name, data in files]

    def resolve(self, body, repo, revision, file):
        sha, files = self.at(repo, revision)
        if file not in files:
            raise _Refused(404, "EntryNotFound", {})
        return files[file], {"ETag": f'"{blob_id(files[file])}"', "X-Repo-Commit": sha}


ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{REPO}/preupload/main", _Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/main", _Handler.commit),
    ("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?", _Handler.info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", _Handler.tree),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<file>.+)", _Handler.resolve),
)


def blob_id(data: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def card_errors(card: str) -> list[str]:
    """What the Hub refuses in a card's metadata, as far as it matters here."""
    data = yaml.safe_load(card.split("---\n")[1])
    errors = []
    if not re.fullmatch(REPO, data.get("base_model", "some/model")):
        errors.append(f'"base_model" {data["base_model"]!r} is no model id')
    for result in [result for entry in data.get("model-index", []) for result in entry["results"]]:
        metrics = [(metric.get("type"), metric.get("value")) for metric in result["metrics"]]
        needed = [result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name"), *sum(metrics, ())]
        if None in needed or "" in needed or not metrics:
            errors.append(f'"model-index" lacks a field: {result}')
    return errors
