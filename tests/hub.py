"""A double of the Hugging Face Hub on this machine, as strict as possible to what huggingface_hub sends.

It knows the requests of a push: those for repositories, branches, trees, large files in one piece and in parts, and
commits. What it does not know, or is not exactly as expected, it refuses and notes in `refused`, which tests compare
with an empty list. Contents of large files are accepted without the token, as the hub's storage does.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_abcdefghijklmnop"
PART = 1 << 16  # bytes of a part; larger files are sent in parts
REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass
class Repository:
    """Commits by branch, the oldest first: (id, title, files by path). A large file is its SHA-256."""

    private: bool
    branches: dict[str, list[tuple[str, str, dict[str, bytes | str]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches["main"] = []
        self.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, title: str, files: dict[str, bytes | str]) -> str:
        commits = self.branches[branch]
        oid = hashlib.sha1(repr((len(commits), branch, title, sorted(files.items()))).encode()).hexdigest()
        commits.append((oid, title, files))
        return oid

    def at(self, revision: str) -> tuple[str, str, dict[str, bytes | str]]:
        found = self.branches.get(revision, [])[-1:]
        found += [each for commits in self.branches.values() for each in commits if each[0] == revision]
        if not found:
            raise RefusedError(404, f"no revision {revision}", "RevisionNotFound")
        return found[0]


@dataclass
class Fault:
    """A fault of the next `times` requests whose "METHOD path" matches.

    Args:
        request: pattern.
        status: answer; 0: the connection is cut.
        after: bytes of the body that are read before it, all if None.
        times: number of requests.
        lost: the request is carried out, and its answer lost.
        silent: nothing comes for half a minute, with the connection open.
    """

    request: str
    status: int = 0
    after: int | None = None
    times: int = 1
    lost: bool = False
    silent: bool = False


class Hub:
    """State of the double: users by token, repositories, stored large files, and what has come in."""

    def __init__(self) -> None:
        self.tokens: dict[str, dict[str, Any]] = {}
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[str] = []
        self.refused: list[str] = []
        self.sent: Counter[str] = Counter()  # bytes of each large file that have arrived, stored or not
        self.faults: list[Fault] = []
        self.blocked: dict[str, threading.Event] = {}  # large files that wait when half of them have arrived
        self.lock = threading.RLock()
        self.url = ""

    def user(self, token: str, *namespaces: str, write: bool = True) -> None:
        self.tokens[token] = {"namespaces": namespaces, "write": write}

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Return the content of a branch."""
        files = self.repositories[repo].at(branch)[2]
        return {name: self.stored[each] if isinstance(each, str) else each for name, each in files.items()}

    def titles(self, repo: str, branch: str = "main") -> list[str]:
        """Return the titles of a branch's commits."""
        return [title for _, title, _ in self.repositories[repo].branches[branch]]


@contextmanager
def serving(hub: Hub):
    """Serve a double on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def talking_to(url: str, home):
    """Let huggingface_hub of this process talk to a double, with `TOKEN`, and let no push wait for another attempt."""
    constants = {
        "ENDPOINT": url,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": f"{home}/no_token",
        "AGENT_HARNESSES_PATH": f"{home}/harnesses",
    }
    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(os.environ, HF_TOKEN=TOKEN))
        patches.enter_context(mock.patch("distill_nemo.publishing.push.WAITS", (0.0,) * 3))
        for name, value in constants.items():
            patches.enter_context(mock.patch(f"huggingface_hub.constants.{name}", value, create=True))
        yield


ROUTES: list[tuple[str, re.Pattern[str], str]] = []


def route(method: str, pattern: str):
    def register(function):
        ROUTES.append((method, re.compile(pattern), function.__name__))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        path = url.path
        named = f"{self.command} {path}"
        self.hub.requests.append(named)
        self.body, lost = b"", False
        fault = next((each for each in self.hub.faults if each.times and re.search(each.request, named)), None)
        size = int(self.headers.get("Content-Length", 0))
        sha = next(iter(re.findall(r"[0-9a-f]{64}", path)), None) if self.command == "PUT" else None
        try:
            if self.headers.get("Transfer-Encoding"):
                raise RefusedError(411, "a length is needed")
            if fault is not None:
                fault.times -= 1
                lost = fault.lost
                self.read(size if fault.after is None else min(fault.after, size), sha)
                if fault.silent:
                    threading.Event().wait(30)
                if not lost:
                    if not fault.status:
                        return self.cut()
                    raise RefusedError(fault.status, "a fault")
            elif sha in self.hub.blocked:
                self.read(size // 2, sha)
                self.hub.blocked[sha].wait(60)
            self.read(size - len(self.body), sha)
            if len(self.body) < size:
                return self.cut()
            with self.hub.lock:
                content, headers = self.dispatch(path)
        except RefusedError as refusal:
            headers = {"X-Error-Message": refusal.message}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            return self.send(refusal.status, {"error": refusal.message, **refusal.more}, headers)
        if lost:
            return self.cut()
        self.send(200, content, headers)

    do_GET = do_POST = do_PUT = answer

    def read(self, size: int, sha: str | None) -> None:
        while size > 0 and (block := self.rfile.read1(min(size, 1 << 14))):
            self.body += block
            size -= len(block)
            if sha:
                self.hub.sent[sha] += len(block)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def dispatch(self, path: str) -> tuple[Any, dict[str, str]]:
        for method, pattern, name in ROUTES:
            match = pattern.fullmatch(path)
            if method == self.command and match:
                try:
                    answer = getattr(self, name)(**{key: unquote(value) for key, value in match.groupdict().items()})
                    return answer if isinstance(answer, tuple) else (answer, {})
                except (AssertionError, KeyError) as error:
                    self.hub.refused.append(f"{self.command} {self.path}: {error}")
                    raise RefusedError(400, f"not as huggingface_hub sends it: {error}") from None
        self.hub.refused.append(f"{self.command} {self.path}")
        raise RefusedError(501, f"unknown request {self.command} {path}")

    def json(self, required: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:
        content = json.loads(self.body)
        assert required <= content.keys() <= required | optional, sorted(content)
        return content

    def no_query(self) -> None:
        assert not self.query, self.query

    def user(self) -> dict[str, Any]:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        assert kind == "Bearer", "no token"
        if token not in self.hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repository(self, repo: str, write: bool = False) -> Repository:
        user = self.user()
        found, own = self.hub.repositories.get(repo), repo.partition("/")[0] in user["namespaces"]
        if found is None or (found.private and not own):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if write and not (own and user["write"]):
            raise RefusedError(403, "You don't have the right to write")
        return found

    @route("GET", "/api/agent-harnesses")
    def agent_harnesses(self):
        return {"standardEnvVars": [], "harnesses": {}}

    @route("POST", "/api/repos/create")
    def create(self):
        self.no_query()
        user, asked = self.user(), self.json({"name", "organization"}, {"visibility", "private", "type"})
        assert asked.get("type") in (None, "model") and asked.get("visibility") in (None, "private", "public"), asked
        repo = f"{asked['organization']}/{asked['name']}"
        if not user["write"] or asked["organization"] not in user["namespaces"]:
            raise RefusedError(403, "You don't have the rights to create a model under this namespace")
        if repo in self.hub.repositories:
            raise RefusedError(409, "You already created this model repo", url=f"{self.hub.url}/{repo}")
        self.hub.repositories[repo] = Repository(asked.get("visibility") == "private" or asked.get("private") is True)
        return {"url": f"{self.hub.url}/{repo}", "name": repo, "id": "0"}

    @route("GET", f"/api/models/{REPOSITORY}")
    def info(self, repo):
        return self.revision(repo, "main")

    @route("GET", f"/api/models/{REPOSITORY}/auth-check/write")
    def auth_check(self, repo):
        self.no_query()
        self.repository(repo, write=True)
        return {}

    @route("POST", f"/api/models/{REPOSITORY}/branch/(?P<branch>[^/]+)")
    def branch(self, repo, branch):
        self.json(set())
        branches = self.repository(repo, write=True).branches
        if branch in branches:
            raise RefusedError(409, "Reference already exists")
        branches[branch] = list(branches["main"])
        return {}

    @route("GET", f"/api/models/{REPOSITORY}/revision/(?P<revision>[^/]+)")
    def revision(self, repo, revision):
        if self.query != {"expand": "xetEnabled"}:  # as huggingface_hub did before 1.0
            self.no_query()
        found = self.repository(repo)
        return {"id": repo, "sha": found.at(revision)[0], "private": found.private, "siblings": []}

    @route("GET", f"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)")
    def tree(self, repo, revision):
        """List two files a page."""
        start = int(self.query.pop("cursor", 0))
        assert {name: value.lower() for name, value in self.query.items()} == {"recursive": "true", "expand": "false"}
        files = list(self.repository(repo).at(revision)[2].items())
        entries = [self.entry(name, content) for name, content in files[start : start + 2]]
        following = f"{self.hub.url}{urlsplit(self.path).path}?recursive=True&expand=False&cursor={start + 2}"
        return entries, {"Link": f'<{following}>; rel="next"'} if start + 2 < len(files) else {}

    def entry(self, name: str, content: bytes | str) -> dict[str, Any]:
        if isinstance(content, bytes):
            return {"type": "file", "path": name, "size": len(content), "oid": blob(content)}
        size = len(self.hub.stored[content])
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{content}\nsize {size}\n".encode()
        lfs = {"oid": content, "size": size, "pointerSize": len(pointer)}
        return {"type": "file", "path": name, "size": size, "oid": blob(pointer), "lfs": lfs}

    @route("POST", "/api/validate-yaml")
    def validate(self):
        content = self.json({"content", "repoType"})
        assert content["repoType"] == "model"
        found = re.match(r"---\n(.*?\n)---\n", content["content"], re.S)
        assert found and isinstance(yaml.safe_load(found[1]), dict), "a card without metadata"
        return {"errors": [], "warnings": []}

    @route("POST", f"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo, revision):
        self.no_query()
        there = self.repository(repo, write=True).at(revision)[2]
        answers = []
        for file in self.json({"files"})["files"]:
            assert file.keys() == {"path", "sample", "size"} and len(base64.b64decode(file["sample"])) <= 512, file
            mode = "lfs" if file["path"].endswith(".safetensors") or file["size"] > 10 << 20 else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in there:
                content = there[file["path"]]
                answer["oid"] = blob(content) if isinstance(content, bytes) else content
            answers.append(answer)
        return {"files": answers}

    @route("POST", f"/{REPOSITORY}\\.git/info/lfs/objects/batch")
    def batch(self, repo):
        self.no_query()
        assert self.headers["Content-Type"] == "application/vnd.git-lfs+json", self.headers["Content-Type"]
        self.repository(repo, write=True)
        asked = self.json({"operation", "transfers", "objects", "hash_algo"}, {"ref"})
        assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256"), asked
        assert {"basic", "multipart"} <= set(asked["transfers"]), asked
        return {"transfer": "basic", "objects": [self.upload(repo, **each) for each in asked["objects"]]}

    def upload(self, repo: str, oid: str, size: int) -> dict[str, Any]:
        assert re.fullmatch("[0-9a-f]{64}", oid) and type(size) is int
        if oid in self.hub.stored:
            return {"oid": oid, "size": size}
        href, header = f"{self.hub.url}/storage/{oid}", {}
        if size > PART:
            parts = range(1, -(-size // PART) + 1)
            header = {"chunk_size": str(PART)} | {f"{number:05d}": f"{href}/{number}" for number in parts}
            href = f"{self.hub.url}/storage/{oid}/complete"
        verify = {"href": f"{self.hub.url}/verify/{repo}", "header": {}}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href, "header": header}, "verify": verify}}

    @route("PUT", "/storage/(?P<oid>[0-9a-f]{64})")
    def put(self, oid):
        self.without_token()
        self.store(oid, self.body)
        return {}

    @route("PUT", "/storage/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
    def put_part(self, oid, number):
        self.without_token()
        self.hub.parts[oid, int(number)] = self.body
        return {}, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    @route("POST", "/storage/(?P<oid>[0-9a-f]{64})/complete")
    def complete(self, oid):
        asked = self.json({"oid", "parts"})
        assert asked["oid"] == oid
        parts = [self.hub.parts[oid, each["partNumber"]] for each in asked["parts"]]
        etags = [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
        assert etags == [each["etag"] for each in asked["parts"]], "parts by their tags"
        self.store(oid, b"".join(parts))
        return {}

    def without_token(self) -> None:
        assert "Authorization" not in self.headers, "the token is sent to the storage"

    def store(self, oid: str, content: bytes) -> None:
        assert hashlib.sha256(content).hexdigest() == oid, "content has another hash"
        assert oid not in self.hub.stored, "a file is sent twice"
        self.hub.stored[oid] = content

    @route("POST", f"/verify/{REPOSITORY}")
    def verify(self, repo):
        self.repository(repo, write=True)
        asked = self.json({"oid", "size"})
        assert len(self.hub.stored[asked["oid"]]) == asked["size"]
        return {}

    @route("POST", f"/api/models/{REPOSITORY}/commit/(?P<branch>[^/]+)")
    def commit(self, repo, branch):
        self.no_query()
        assert self.headers["Content-Type"] == "application/x-ndjson"
        found = self.repository(repo, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        about = header["value"]
        assert header["key"] == "header" and about.keys() <= {"summary", "description", "parentCommit"}, header
        head, _, there = found.at(branch)
        if about.get("parentCommit", head) != head:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(there)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        assert operations and files != there, "an empty commit"
        oid = found.commit(branch, about["summary"], files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "hookOutput": ""}

    def apply(self, key: str, value: dict[str, Any], files: dict[str, bytes | str]) -> None:
        if key == "file":
            assert value.keys() == {"content", "path", "encoding"} and value["encoding"] == "base64", value
            files[value["path"]] = base64.b64decode(value["content"], validate=True)
        elif key == "lfsFile":
            assert value.keys() == {"path", "algo", "oid", "size"} and value["algo"] == "sha256", value
            assert len(self.hub.stored[value["oid"]]) == value["size"], "a file that is not stored"
            files[value["path"]] = value["oid"]
        else:
            assert key == "deletedFile" and value.keys() == {"path"}, key
            del files[value["path"]]


def blob(content: bytes) -> str:
    """Return git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
