"""Push an exported directory to the Hugging Face Hub by huggingface_hub: all files in one commit. No torch.

Uploads become visible with the commit, which comes last. A push that was interrupted goes on with the same command:
files whose content the hub has stored are not sent again, and a branch that holds every file gets no commit.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from distill_nemo.fields import first_few, require
from distill_nemo.hub import limit_silence
from distill_nemo.push_config import Destination, PushConfig
from distill_nemo.runtime.file_hashes import hash_part, whole_file
from distill_nemo.runtime.files import read_object_if_any, write_atomically

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

TOKEN = "HF_TOKEN"
# What transformers would open, or how it reads it.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "hf_quant_config.json")
OF_EVERY_EXPORT = ("config.json", "README.md")
WAITS = (5.0, 15.0, 60.0, 180.0, 300.0, 300.0, 300.0)  # seconds before each further attempt
MAX_REGULAR_BYTES = 10 * 2**20  # the hub keeps larger files by their SHA-256
TRANSIENT = (408, 412, 429)  # and 5xx; 412: another commit came in between
ADVICE = {
    401: f"the hub does not accept the token in {TOKEN}: export a valid one",
    403: f"the token in {TOKEN} may not write there: export one with write access to it",
    404: f"the repository does not exist, or the token in {TOKEN} may not see it",
}


class PushError(RuntimeError):
    """A push that did not succeed. The export is whole."""


@dataclass(frozen=True)
class LocalFile:
    """A file to push, by its path in the repository.

    Args:
        path: the file.
        size: number of bytes.
        sha256: of the content.
        blob: git's hash of the content, by which the hub knows small text files; None for larger files.
    """

    path: Path
    size: int
    sha256: str
    blob: str | None

    def is_at(self, there: "RepoFile | None") -> bool:
        """Return True if a file of the repository has this content."""
        return there is not None and there.size == self.size and _content(there) in (self.sha256, self.blob)


class Remote:
    """A branch of a repository, with the token of this process's environment.

    Raises:
        ValueError: if there is no token.
    """

    def __init__(self, destination: Destination, private: bool) -> None:
        from huggingface_hub import HfApi

        token = os.environ.get(TOKEN, "").strip()
        require(bool(token), f"push_to = {destination.repository} needs a token: export {TOKEN}, or leave push_to out")
        is_one_word = token.isascii() and token.isprintable() and " " not in token
        require(is_one_word, f"{TOKEN} holds more than a token, such as a second line: export the token alone")
        self.repository, self.branch = destination
        self.private, self.token = private, token
        self.is_private = False  # until the hub is asked
        self.api = HfApi(token=token)

    def create(self) -> None:
        """Create the repository and the branch, where they are missing.

        Raises:
            OSError, RuntimeError: from huggingface_hub.
        """
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        limit_silence()  # of the client, which an error of the network replaces
        self.api.create_repo(self.repository, private=self.private, exist_ok=True)
        # Asked by hand: auth_check has had its argument `write` since huggingface_hub 1.0 only.
        asked = f"{self.api.endpoint}/api/models/{self.repository}/auth-check/write"
        hf_raise_for_status(get_session().get(asked, headers=build_hf_headers(token=self.token)))
        if self.branch != "main":
            self.api.create_branch(self.repository, branch=self.branch, exist_ok=True)

    def head(self) -> str:
        """Return the commit that the branch points at."""
        found = self.api.repo_info(self.repository, revision=self.branch)
        assert found.sha is not None, "the hub states it for a revision"
        self.is_private = bool(found.private)
        return found.sha

    def files(self, revision: str) -> "dict[str, RepoFile]":
        """Return the files of a commit or branch by their path."""
        from huggingface_hub.hf_api import RepoFile

        listed = self.api.list_repo_tree(self.repository, recursive=True, revision=revision)
        return {each.path: each for each in listed if isinstance(each, RepoFile)}

    def kept_elsewhere(self) -> set[str]:
        """Return the content of files that replacing them on the branch does not lose: those of the branch `main`."""
        return set() if self.branch == "main" else {_content(file) for file in self.files("main").values()}

    def commit(self, files: dict[str, LocalFile], deleted: Iterable[str], parent: str) -> str:
        """Send what the hub has not stored, then commit all, if the branch still points at `parent`."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        added = [CommitOperationAdd(name, str(file.path)) for name, file in files.items()]
        for operation, file in zip(added, files.values(), strict=True):
            operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # or each attempt would read the file again
        operations = [*added, *(CommitOperationDelete(name) for name in deleted)]
        made = self.api.create_commit(
            self.repository,
            operations,
            commit_message="Upload a distilled student",
            revision=self.branch,
            parent_commit=parent,
        )
        return made.oid

    def explained(self, error: BaseException) -> str:
        """Return an error in a line, with advice, and without the token."""
        status = _status(error)
        where = f"{self.repository} on {self.api.endpoint}"
        said = ADVICE.get(status or 0) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{where}: {said.replace(self.token, '***')}"


def check_push(push: PushConfig, directory: Path) -> None:
    """Ask the hub whether an export into `directory` may be pushed. Creates the repository, if there is none.

    Raises:
        ValueError: if there is no token, it may not write, or the repository holds what may not be replaced.
        PushError: if the hub cannot be asked.
    """
    destination = push.destination()
    if destination is None:
        return
    remote = Remote(destination, push.push_private)
    try:
        remote.create()
        there, kept = remote.files(remote.head()), remote.kept_elsewhere()
    except Exception as error:  # huggingface_hub raises those of its HTTP library, too
        if _status(error) in ADVICE:
            raise ValueError(f"push_to = {remote.explained(error)}, or leave push_to out") from None
        raise PushError(
            f"push_to = {remote.explained(error)}. The hub must answer where the push is made: leave push_to out, and "
            "push later, from a machine with a network: nemo distill export checkpoint=... output=... push_to=..."
        ) from error
    refusal = _refusal(remote, there, OF_EVERY_EXPORT, _pushed_before(directory) | kept, push)
    require(not refusal, f"push_to = {refusal}")


def push_directory(push: PushConfig, directory: Path) -> str | None:
    """Push all files of a directory, and compare what the hub then holds with them. Return the commit.

    Raises:
        ValueError: as `check_push`.
        PushError: if the hub refuses, or after the last of several attempts over half an hour.
    """
    destination = push.destination()
    if destination is None:
        return None
    remote, files = Remote(destination, push.push_private), dict(_local_files(directory))
    size = sum(file.size for file in files.values())
    print(f"pushing {directory} to {remote.repository}: {len(files)} files, {size / 1e9:,.2f} GB", flush=True)
    try:
        commit = _with_patience(remote, files, push, directory)
    except PushError as error:
        raise PushError(
            f"the push failed, and the export in {directory} is whole: {error}. The same command sends what is missing"
        ) from error
    print(f"pushed {directory} to {remote.api.endpoint}/{remote.repository}/tree/{commit}", flush=True)
    return commit


def _with_patience(remote: Remote, files: dict[str, LocalFile], push: PushConfig, directory: Path) -> str:
    for wait in (*WAITS, None):
        try:
            return _attempt(remote, files, push, directory)
        except PushError:
            raise
        except Exception as error:  # huggingface_hub raises those of its HTTP library, too
            if wait is None or _lasts(error):
                raise PushError(remote.explained(error)) from error
            print(f"warning: {remote.explained(error)}; trying again in {wait:.0f} s", flush=True)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _attempt(remote: Remote, files: dict[str, LocalFile], push: PushConfig, directory: Path) -> str:
    remote.create()
    parent = remote.head()
    there, known = remote.files(parent), _pushed_before(directory)
    ours = {each for file in files.values() for each in (file.sha256, file.blob) if each}
    if refusal := _refusal(remote, there, files, known | ours | remote.kept_elsewhere(), push):
        raise PushError(refusal)
    stale = [name for name in there if _is_weights(name) and name not in files]
    if not stale and not _apart(files, there):
        return parent
    write_atomically(_record(directory), json.dumps({"content": sorted(known | ours)}, indent=0))
    commit = remote.commit(files, stale, parent)
    if apart := _apart(files, remote.files(commit)):
        raise PushError(f"{remote.repository} holds other content than was sent: {', '.join(first_few(apart))}")
    return commit


def _refusal(
    remote: Remote, there: "dict[str, RepoFile]", names: Iterable[str], known: set[str], push: PushConfig
) -> str:
    """Return the reason not to push files of these names, and weights; empty if all there were pushed from here."""
    if push.push_private and not remote.is_private:
        return (
            f"{push.push_to} is public, and push_private = True; make it private in its settings, name another "
            "repository, or leave push_private out"
        )
    replaced = [file for name, file in there.items() if name in names or _is_weights(name)]
    foreign = [file.path for file in replaced if _content(file) not in known]
    if not foreign or push.push_overwrite:
        return ""
    return (
        f"{push.push_to} holds files that this output has not pushed: {', '.join(first_few(foreign))}; name another "
        "repository or branch, or set push_overwrite=true to replace them"
    )


def _apart(files: dict[str, LocalFile], there: "dict[str, RepoFile]") -> list[str]:
    return [name for name, file in files.items() if not file.is_at(there.get(name))]


def _is_weights(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHTS)


def _content(file: "RepoFile") -> str:
    return file.blob_id if file.lfs is None else file.lfs.sha256


def _local_files(directory: Path) -> Iterator[tuple[str, LocalFile]]:
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        size, blob = path.stat().st_size, None
        if size <= MAX_REGULAR_BYTES:
            blob = hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()
        yield path.relative_to(directory).as_posix(), LocalFile(path, size, hash_part(whole_file(path)), blob)


def _record(directory: Path) -> Path:
    target = directory.resolve()
    return target.with_name(f".{target.name}.pushed.json")


def _pushed_before(directory: Path) -> set[str]:
    """Return the hashes of the files that were pushed from a directory, or were about to be."""
    try:
        content = read_object_if_any(_record(directory)).get("content")
    except ValueError:
        return set()
    return {each for each in content if isinstance(each, str)} if isinstance(content, list) else set()


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error, or one that it was raised from, stands for."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None


def _lasts(error: Exception) -> bool:
    """Return True if another attempt would fail alike."""
    status = _status(error)
    if status is None:
        return isinstance(error, ValueError | FileNotFoundError | PermissionError)
    return status < 500 and status not in TRANSIENT
