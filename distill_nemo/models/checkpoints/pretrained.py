"""Open Hugging Face directories with transformers: the only place that does."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_pretrained(auto_class: Any, path: str | Path, **options: Any) -> Any:
    """Return `auto_class.from_pretrained(path)` from local files, without running code among them.

    Args:
        auto_class: one of transformers' classes; its type hints fit no protocol.
        path: the directory.
        options: further options of `from_pretrained`.

    Raises:
        ValueError: if `path` is not a directory (transformers would take it for a name on the hub), or needs such code.
    """
    if not Path(path).is_dir():
        raise ValueError(f"no such directory: {path}")
    try:
        return auto_class.from_pretrained(str(path), trust_remote_code=False, local_files_only=True, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"{path} needs the code that its auto_map names, which is never run here") from None


def new_model(config: Any, **options: Any) -> "PreTrainedModel":
    """Return the causal language model of a transformers configuration, its weights new."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def empty_model(config: Any) -> torch.nn.Module:
    """Return the same, its weights on the meta device. The attention that the file names need not be installed."""
    with torch.device("meta"):
        return new_model(config, attn_implementation="eager")
