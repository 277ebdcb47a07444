"""Names of models and tokenizers on the Hugging Face Hub in place of directories: `ORG/NAME`, `ORG/NAME@REVISION`.

A directory of that name takes precedence. huggingface_hub downloads into its cache (HF_HOME), takes the token from the
environment, and with HF_HUB_OFFLINE=1 uses the cache alone. Nothing that could run code is downloaded, except the
pickles that `convert` is asked to open. No torch.
"""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill_nemo.runtime.files import read_object_if_any

if TYPE_CHECKING:
    import httpx
    from huggingface_hub.hf_api import RepoSibling

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)
READ_SECONDS, SILENCE_SECONDS = 30.0, 600.0  # without an answer; a commit of many files takes minutes
COMMIT = re.compile(r"[0-9a-f]{40}")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})", re.ASCII)  # at the end of a path
DESCRIPTION = (  # all files but weights
    *("config.json", "hf_quant_config.json", "generation_config.json", "*processor_config.json", "README.md"),
    *("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*"),  # which an export copies
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("tekken.json", "*.jinja", "chat_template.json", "model.safetensors.index.json"),
)
WEIGHTS = ("*.safetensors",)
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")  # either one is enough
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# "*" also matches "/". Mistral's consolidated files hold the same weights once more.
LEFT_OUT = (
    "*.py",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.ckpt",
    "*/*.safetensors",
    "*/*.json",
    "*/*.model",
    "consolidated*",
)


class HubName(NamedTuple):
    """A repository, and a branch, tag or commit of it; None: the head of `main`."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def hub_name(value: str, here: Path = Path()) -> HubName | None:
    """Return the name on the hub that `value` is; None for a path, as every directory is that exists below `here`."""
    match = NAME.fullmatch(value)
    return HubName(*match.groups()) if match and not (here / value).is_dir() else None


def recorded_name(path: str) -> str:
    """Return `ORG/NAME@COMMIT` for a directory in a cache, so that records do not depend on its place; else `path`."""
    match = SNAPSHOT.fullmatch("/".join(Path(path).parts[-3:]))
    return f"{match[1]}/{match[2]}@{match[3]}" if match else path


def at_commit(name: HubName) -> HubName:
    """Return the name with the commit that its branch or tag stands for; without a network, as the cache knows it.

    Raises:
        ValueError: as `directory_of`.
    """
    if name.revision and COMMIT.fullmatch(name.revision):
        return name
    return name._replace(revision=_snapshot(name, ("config.json",)).name)


def directory_of(value: str, weights: bool = True) -> str:
    """Return `value` if it is a path, else the directory in the cache, after a download of what it lacks.

    Ranks of a node may call it at the same time: the library's locks let each file be downloaded once.

    Args:
        value: path, or name on the hub.
        weights: False leaves them out, as for a tokenizer.

    Raises:
        ValueError: for a name that is unknown, gated, or not in the cache when the hub cannot be reached; or if the
            disk has no room. The message says what to do.
    """
    name = hub_name(value)
    if name is None:
        return value
    name = at_commit(name)
    directory = _snapshot(name, DESCRIPTION)
    if not weights or _is_whole(directory):
        return str(directory)
    _check_space(name, directory, WEIGHTS, _listed(name))
    return str(_snapshot(name, (*DESCRIPTION, *WEIGHTS), progress=True))


def pickles_of(value: str) -> str:
    """Return `value` if it is a path, else the directory in the cache, after a download of pickled weights.

    Raises:
        ValueError: as `directory_of`; or if the repository has safetensors, too.
    """
    name = hub_name(value)
    if name is None:
        return value
    name = at_commit(name)
    directory, listed = _snapshot(name, DESCRIPTION), _listed(name)
    if any((directory / each).is_file() for each in SAFETENSORS) or {*map(_file, listed)} & {*SAFETENSORS}:
        raise ValueError(f"{name} holds safetensors, which training reads as they are")
    _check_space(name, directory, PICKLES, listed)
    return str(_snapshot(name, (*DESCRIPTION, *PICKLES), progress=True))


def limit_silence() -> None:
    """Let requests to the hub fail when nothing comes for a while. By itself, huggingface_hub waits for ever."""
    import huggingface_hub
    from huggingface_hub.utils import get_session

    session = get_session()
    if not hasattr(huggingface_hub, "configure_http_backend"):
        if _limit not in session.event_hooks["request"]:
            session.event_hooks["request"].append(_limit)
    elif "send" not in vars(session):  # before version 1.0: a session of requests for each thread
        huggingface_hub.configure_http_backend(partial(_limited, session))  # type: ignore[reportCallIssue]


def _limit(request: "httpx.Request") -> None:
    """Set a limit where huggingface_hub has asked for none, for which a client has no setting."""
    given, silence = request.extensions["timeout"], _silence(request.method)
    request.extensions["timeout"] = {name: silence if value is None else value for name, value in given.items()}


def _limited(session: Any) -> Any:
    """Return a copy of a session of requests that does the same."""
    limited = deepcopy(session)
    send = limited.send
    limited.send = lambda request, **given: send(
        request, **given | {"timeout": given["timeout"] or _silence(request.method)}
    )
    return limited


def _silence(method: str | None) -> float:
    return READ_SECONDS if method in ("GET", "HEAD") else SILENCE_SECONDS


def description_of(value: str) -> str:
    """Return `value` if it is a path, else a directory in the cache with all weights or none. Downloads no weights.

    Raises:
        ValueError: as `directory_of`.
    """
    directory = directory_of(value, weights=False)
    name = hub_name(value)
    if name is None or _is_whole(Path(directory)) or not any(Path(directory).glob("*.safetensors")):
        return directory
    from huggingface_hub import cached_assets_path

    apart = cached_assets_path("distill-nemo", subfolder="descriptions")  # a download of the weights was interrupted
    return str(_snapshot(at_commit(name), DESCRIPTION, apart))


def cached(value: str) -> str:
    """Return the directory in the cache for a name on the hub that is there, else `value`. Downloads nothing."""
    name = hub_name(value)
    if name is not None:
        with contextlib.suppress(OSError, ValueError):
            return str(_library_snapshot(name, DESCRIPTION, local_files_only=True))
    return value


def _snapshot(name: HubName, patterns: tuple[str, ...], cache: Path | None = None, progress: bool = False) -> Path:
    """Return the snapshot's directory in a cache, once it has all files of `patterns`."""
    limit_silence()
    with _progress_bars(progress):
        try:
            return _library_snapshot(name, patterns, cache)
        except Exception as error:  # of one of two HTTP clients, depending on the version, or of the library
            refusal = _refusal(name, error)
        if not isinstance(refusal, _UnreachableError):
            raise refusal from None
        try:
            return _library_snapshot(name, patterns, cache, local_files_only=True)
        except (OSError, ValueError):
            raise ValueError(str(refusal)) from None


def _library_snapshot(
    name: HubName, patterns: tuple[str, ...], cache: Path | None = None, local_files_only: bool = False
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name.repository,
            revision=name.revision,
            cache_dir=cache,
            allow_patterns=list(patterns),
            ignore_patterns=_left_out(patterns),
            local_files_only=local_files_only,
        )
    )


class _UnreachableError(ValueError):
    """The hub did not answer, so the cache decides."""


def _refusal(name: HubName, error: Exception) -> ValueError:
    """Return the error for the user, with the way out."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name.repository}"
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error).strip().partition("\n")[0].rstrip(".")
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f"{name} is gated: accept its terms at {page}, and set HF_TOKEN to a token of that account")
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{page} has no branch, tag or commit {name.revision}")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ValueError(
            f"{name}: there is no such directory here, and no such model at {constants.ENDPOINT}; if it is private, "
            "set HF_TOKEN"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return ValueError(f"{name} could not be downloaded to {constants.HF_HUB_CACHE}: {error}; set HF_HOME elsewhere")
    return _UnreachableError(
        f"{name}: there is no such directory here, it is not whole in the cache ({constants.HF_HUB_CACHE}), and "
        f"{constants.ENDPOINT} cannot be asked: {reason}. Where there is a network: hf download {name.repository}"
        f"{f' --revision {name.revision}' if name.revision else ''}; the cache goes with HF_HOME"
    )


def _is_whole(directory: Path) -> bool:
    """Return True if all files with weights are there."""
    single, index = (directory / each for each in SAFETENSORS)
    if single.is_file():
        return True
    places = read_object_if_any(index).get("weight_map")
    return isinstance(places, dict) and bool(places) and all((directory / str(x)).is_file() for x in places.values())


def _left_out(patterns: tuple[str, ...]) -> list[str]:
    """Return the patterns of what is never downloaded, except for those that `patterns` ask for by name."""
    return [each for each in LEFT_OUT if not any(fnmatch(pattern, each) for pattern in patterns)]


def _check_space(name: HubName, directory: Path, patterns: tuple[str, ...], listed: "list[RepoSibling]") -> None:
    """Print how much is downloaded.

    Raises:
        ValueError: if the disk has no room for it.
    """
    from huggingface_hub.utils import filter_repo_objects

    ignored = _left_out(patterns)
    if not listed:
        return
    wanted = filter_repo_objects(listed, allow_patterns=list(patterns), ignore_patterns=ignored, key=_file)
    missing = sum(file.size or 0 for file in wanted if not (directory / _file(file)).is_file())
    free = shutil.disk_usage(directory.parents[1]).free
    if missing > free:
        raise ValueError(
            f"{name} needs {missing / 1e9:,.2f} GB, and {directory.parents[2]} has {free / 1e9:,.2f} GB free: free "
            "space, or set HF_HOME to a directory on a larger disk"
        )
    print(f"downloading {name}: {missing / 1e9:,.2f} GB to {directory}", flush=True)


def _listed(name: HubName) -> "list[RepoSibling]":
    """Return the files of a repository with their sizes; empty if the hub does not answer, as a download will say."""
    from huggingface_hub import HfApi

    limit_silence()
    try:
        return HfApi().model_info(name.repository, revision=name.revision, files_metadata=True).siblings or []
    except Exception:
        return []


def _file(sibling: "RepoSibling") -> str:
    return sibling.rfilename


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
