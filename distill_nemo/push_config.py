"""The repository that an export is pushed to. No torch: the launcher imports this file."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from distill_nemo.fields import require, setting

_DESTINATION = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@([\w][\w./-]{0,199}))?", re.ASCII)
_TOKEN = re.compile(r"hf_\w+")


class Destination(NamedTuple):
    """A branch of a repository on the Hugging Face Hub."""

    repository: str
    branch: str


@dataclass(kw_only=True)
class PushConfig:
    """A push of an export. Nothing is pushed unless `push_to` is set; the token comes from HF_TOKEN alone."""

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
        if match is None or "--" in match[1] or ".." in self.push_to or match[1].endswith(".git"):
            shown = _TOKEN.sub("hf_***", self.push_to)
            raise ValueError(
                f'push_to = "{shown}" is not ORG/NAME or ORG/NAME@BRANCH, a repository on the Hugging Face Hub; the '
                "token belongs in HF_TOKEN"
            )
        return Destination(match[1], match[2] or "main")
