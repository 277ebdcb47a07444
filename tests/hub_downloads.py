"""A double of the Hugging Face Hub's API on loopback, for downloads: what huggingface_hub asks, and nothing else."""

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin")  # served from another address, as LFS files are


@dataclass
class Repository:
    """Commits, and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # that sees the files, if it is gated


class Hub:
    """Context manager that serves repositories from memory.

    `served` counts the bytes of content by file, `requests` lists every request, and `strange` those that the double
    does not know, which a test should find empty.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.served: dict[str, int] = {}
        self.requests: list[str] = []
        self.strange: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}/cdn"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository, files, revision="main", token=None):
        """Make `files` (a directory, or contents by path) the head of a branch. Return the commit."""
        if isinstance(files, Path):
            found = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        repo = self.repositories.setdefault(repository, Repository())
        repo.token = token
        digest = hashlib.sha1(repr((len(repo.commits), sorted(files))).encode())
        repo.commits[digest.hexdigest()] = files
        repo.revisions[revision] = digest.hexdigest()
        self.blobs |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return digest.hexdigest()


@contextlib.contextmanager
def asked(url, home, **constants):
    """Let huggingface_hub in this process ask the double at `url`, with its cache below `home`."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    values |= {"HF_HUB_CACHE": f"{home}/hub", "HF_ASSETS_CACHE": f"{home}/assets", "HF_TOKEN_PATH": f"{home}/token"}
    with (
        mock.patch.multiple("huggingface_hub.constants", **values, **constants),
        # where it was imported to before version 1.0
        mock.patch("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, create=True),
    ):
        yield


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            """Print nothing."""

        def do_GET(self):
            hub.requests.append(f"{self.command} {self.path}")
            url = urlsplit(self.path)
            match [unquote(part) for part in url.path.split("/")[1:]]:
                case ["api", "models", org, name]:
                    self._info(f"{org}/{name}", "main", parse_qs(url.query))
                case ["api", "models", org, name, "revision", revision]:
                    self._info(f"{org}/{name}", revision, parse_qs(url.query))
                case ["api", "models", org, name, "tree", revision]:
                    self._tree(f"{org}/{name}", revision, parse_qs(url.query))
                case ["api", "agent-harnesses"]:  # asked once, by a process that an agent started
                    self._error(404, "NotFound")
                case ["cdn", digest]:
                    self._content(hub.blobs[digest], digest, {"ETag": f'"{digest}"'})
                case [org, name, "resolve", revision, *path] if org != "api":
                    self._resolve(f"{org}/{name}", revision, "/".join(path))
                case _:
                    hub.strange.append(self.requestline)
                    self._error(400, "BadRequest")

        do_HEAD = do_GET

        def _found(self, name, revision):
            """Return commit and files, or answer with the hub's error."""
            if name not in hub.repositories:
                self._error(401, "RepoNotFound")  # as the hub answers without a token
                return None
            repo = hub.repositories[name]
            commit = repo.revisions.get(revision, revision)
            if commit not in repo.commits:
                self._error(404, "RevisionNotFound")
                return None
            return commit, repo.commits[commit]

        def _info(self, name, revision, query):
            if found := self._found(name, revision):
                commit, files = found
                siblings = [{"rfilename": path} for path in files]
                if query.get("blobs"):
                    siblings = [_described(path, files[path]) | {"rfilename": path} for path in files]
                self._json({"_id": "0", "id": name, "modelId": name, "sha": commit, "siblings": siblings})

        def _tree(self, name, revision, query):
            if query.get("recursive") not in (["true"], ["True"]):
                hub.strange.append(self.requestline)
            if found := self._found(name, revision):
                self._json([_described(path, content) | {"type": "file"} for path, content in found[1].items()])

        def _resolve(self, name, revision, path):
            found = self._found(name, revision)
            if found is None:
                return
            commit, files = found
            token = hub.repositories[name].token
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                self._error(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            elif path not in files:
                self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            elif path.endswith(LARGE):
                digest = hashlib.sha256(files[path]).hexdigest()
                linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[path]))}
                self._answer(302, b"", {"X-Repo-Commit": commit, "Location": f"{hub.cdn}/{digest}", **linked})
            else:
                oid = _described(path, files[path])["oid"]
                self._content(files[path], path, {"X-Repo-Commit": commit, "ETag": f'"{oid}"'})

        def _content(self, content, name, headers):
            first, status = 0, 200
            if asked := self.headers.get("Range"):
                first, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            if self.command == "GET":
                hub.served[name] = hub.served.get(name, 0) + len(content) - first
            self._answer(status, content[first:], headers)

        def _json(self, value):
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _error(self, status, code, headers=None):
            self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

        def _answer(self, status, content, headers):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


def _described(path, content):
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    described = {"path": path, "size": len(content), "oid": blob, "blobId": blob}
    if path.endswith(LARGE):
        digest = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 134}
    return described
