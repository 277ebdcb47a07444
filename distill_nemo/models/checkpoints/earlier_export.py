"""Tell the files of an earlier export, which a later one replaces, from those that somebody has put beside them."""

import hashlib
import re
from pathlib import Path

from distill_nemo.models.checkpoints.export_files import (
    CHAT_TEMPLATES,
    GENERATION,
    LICENCES,
    PROCESSORS,
    TOKENIZER_FILES,
)
from distill_nemo.models.checkpoints.hf_tensors import INDEX, SINGLE_FILE
from distill_nemo.models.stored_quantization import MODELOPT_FILE

CARD = "README.md"
WEIGHTS = (SINGLE_FILE, INDEX, "model-[0-9]*-of-[0-9]*.safetensors")
DESCRIPTIONS = ("config.json", GENERATION, MODELOPT_FILE, "pruning.json")  # the last by `nemo distill prune`
WRITTEN = (*WEIGHTS, *DESCRIPTIONS, *TOKENIZER_FILES, *CHAT_TEMPLATES, *PROCESSORS, *LICENCES)
_SEAL = re.compile(r"<!-- distill-nemo wrote the text above, whose SHA-256 is ([0-9a-f]{64}) -->\n")


def sealed(card: str) -> str:
    """Return a model card with a comment at its end, by which `added_to` sees if it was edited."""
    return f"{card}<!-- distill-nemo wrote the text above, whose SHA-256 is {_sha256(card)} -->\n"


def added_to(export: Path) -> list[str]:
    """Return the names of what no export has written into a directory; of the model card, if it was edited since."""
    written = {file for pattern in WRITTEN for file in export.glob(pattern) if file.is_file()}
    return sorted(path.name for path in export.iterdir() if not _is_written(path, written))


def _is_written(path: Path, written: set[Path]) -> bool:
    if path.name == CARD and path.is_file():
        return _is_sealed(path.read_text(encoding="utf-8", errors="replace"))
    return path in written or (path.is_dir() and not path.is_symlink() and written.issuperset(path.iterdir()))


def _is_sealed(text: str) -> bool:
    card, line = text[: text.rfind("<!--")], text[max(text.rfind("<!--"), 0) :]
    found = _SEAL.fullmatch(line)
    return found is not None and found[1] == _sha256(card)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
