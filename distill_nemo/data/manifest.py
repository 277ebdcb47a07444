"""The manifest beside token files, with their tokenizer and the tokens that occur.

It holds the tokens themselves, so that the files can be compared with a model's tokenizer even if the tokenizer that
made them is gone.
"""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

from distill_nemo.runtime.files import read_object, read_object_if_any
from distill_nemo.teacher_store.manifest import MANIFEST, is_store

MAX_VOCABULARY_BYTES = 1 << 26  # unpacked
BEGINNING = b'{\n "key": "'  # of a manifest that `prepare` writes


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if it holds none."""
    try:
        return read_object(path)
    except ValueError:
        return None


def read_manifest(prefix: str) -> dict[str, Any]:
    """Return the manifest of `<prefix>.bin` or a teacher store; empty for token files that `prepare` did not make.

    Raises:
        ValueError: if `prepare` wrote it, and it is damaged. Another file of that name is left alone.
    """
    path = Path(prefix, MANIFEST) if is_store(prefix) else Path(f"{prefix}.json")
    try:
        return read_object_if_any(path)
    except ValueError as error:
        with path.open("rb") as file:
            if file.read(len(BEGINNING)) != BEGINNING:
                return {}
        raise ValueError(f"{error}; restore it, or remove it and prepare the text again") from None


def name_of(prefix: str) -> str:
    """Return the name of a corpus, for errors."""
    return prefix if is_store(prefix) else f"{prefix}.bin"


def keeps_documents_apart(prefix: str) -> bool:
    """Return True if attention and positions stay inside a document in a corpus that was cut into samples."""
    return pack_length(prefix) is not None or read_manifest(prefix).get("documents_apart") is True


def pack_length(prefix: str) -> int | None:
    """Return the length of the packs that `<prefix>.bin` holds, None if it holds documents to be spliced.

    Raises:
        ValueError: for a length that no pack has.
    """
    length = read_manifest(prefix).get("pack")
    if length is not None and (type(length) is not int or length < 2):
        raise ValueError(f"{prefix}.json is damaged: pack = {length!r} is not a number of at least 2 tokens")
    return length


def pack_vocabulary(tokens: dict[int, str]) -> str:
    """Return tokens by id as one line of text: compressed JSON in base64, 0.6 MB for 150,000 tokens."""
    return base64.b64encode(zlib.compress(json.dumps(tokens).encode())).decode()


def max_token_id(manifest: dict[str, Any]) -> int | None:
    """Return the largest id that occurs in the token files, or None if the manifest does not say."""
    largest = manifest.get("max_token_id")
    return largest if type(largest) is int else None


def vocabulary(manifest: dict[str, Any], name: str = "vocabulary") -> dict[int, str] | None:
    """Return the tokens that occur in the token files, by id, or None if the manifest does not say.

    A store also has its teacher's, under the name "teacher_vocabulary".
    """
    packed = manifest.get(name)
    if not isinstance(packed, str):
        return None
    try:
        text = zlib.decompressobj().decompress(base64.b64decode(packed), MAX_VOCABULARY_BYTES)
        return {int(i): str(token) for i, token in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError, zlib.error):
        return None
