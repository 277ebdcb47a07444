"""The one place that opens Hugging Face directories with transformers."""

from pathlib import Path
from typing import Any

import torch


def open_pretrained(auto_class: Any, path: str | Path, **options: Any) -> Any:
    """Return `auto_class.from_pretrained(path)`, from local files, without running code that lies among them.

    Args:
        auto_class: one of transformers' classes; its type hints fit no protocol.
        path: the directory.
        options: further ones of `from_pretrained`.

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


def empty_model(config: Any) -> torch.nn.Module:
    """Return the causal language model of a transformers configuration, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
