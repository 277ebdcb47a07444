"""The repository that an export is pushed to. No torch: the launcher imports this file."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from distill_nemo.fields import require, setting

_DESTINATION = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]{1,200}))?", re.ASCII)
_OTHER_REFERENCE = re.compile(r"HEAD|refs/.*|[0-9a-f]{40}")
_PART = re.compile(r"(?![.-])(?!.*\.\.)[\w.-]+(?<!\.)(?<!\.lock)", re.ASCII)  # of a branch's name, as git allows it
_TOKEN = re.compile(r"hf_\w+")


class Destination(NamedTuple):
    """A branch of a repository on the Hugging Face Hub."""

    repository: str
    branch: str


@dataclass(kw_only=True)
class PushConfig:
    """Push of the export to the Hugging Face Hub, only if `push_to` is set. The token comes from HF_TOKEN alone."""

    push_to: str | None = setting(
        None, "ORG/NAME[@BRANCH] on the Hugging Face Hub: push the export there, with the token in HF_TOKEN"
    )
    push_private: bool = setting(False, "make a private repository, and refuse one that is public")
    push_overwrite: bool = setting(False, "replace weights, config.json and card that were not pushed from this output")

    def destination(self) -> Destination | None:
        """Return the branch to push to, or None.

        Raises:
            ValueError: if `push_to` names none, or is missing and another field needs it.
        """
        if self.push_to is None:
            for name in ("push_private", "push_overwrite"):
                require(not vars(self)[name], f"{name} = True needs push_to")
            return None
        match = _DESTINATION.fullmatch(self.push_to)
        repository, branch = match.groups("main") if match else ("", "")
        if not _is_repository(repository) or not _is_branch(branch):
            shown = _TOKEN.sub("hf_***", self.push_to)
            raise ValueError(
                f'push_to = "{shown}" is not ORG/NAME or ORG/NAME@BRANCH, a repository on the Hugging Face Hub; the '
                "token belongs in HF_TOKEN"
            )
        return Destination(repository, branch)


def _is_repository(name: str) -> bool:
    """Return True for ORG/NAME as the hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith("_") and not name.endswith(".lock")


def _is_branch(name: str) -> bool:
    """Return True for a name that git allows, and that does not stand for a commit or a pull request."""
    return not _OTHER_REFERENCE.fullmatch(name) and all(map(_PART.fullmatch, name.split("/")))
