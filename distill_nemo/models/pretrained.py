"""The one place that opens Hugging Face directories with transformers."""

from pathlib import Path
from typing import Any, Protocol


class AutoClass(Protocol):
    """One of transformers' classes with `from_pretrained`."""

    def from_pretrained(self, path: str, /, **options: Any) -> Any: ...  # noqa: D102


def open_pretrained(auto_class: AutoClass, path: str | Path, **options: Any) -> Any:
    """Return `auto_class.from_pretrained(path)`, from local files, without running code that lies among them.

    Raises:
        ValueError: if `path` is no directory, which transformers would take for a name on the hub, or needs such code.
    """
    if not Path(path).is_dir():
        raise ValueError(f"no such directory: {path}")
    try:
        return auto_class.from_pretrained(str(path), trust_remote_code=False, local_files_only=True, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"{path} needs the code that its auto_map names, which is never run here") from None
