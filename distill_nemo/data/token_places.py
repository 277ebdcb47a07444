"""Places of a text's tokens, by the lengths of the tokens.

A byte-level tokenizer writes each byte of a text into one token. Others need the library's own offsets, which take it
a fifth longer.
"""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from array import array

    import tokenizers

CUTTING = ("Split", "Digits", "ByteLevel")  # pre-tokenizers that add nothing to a text


@dataclass(frozen=True)
class TokenBytes:
    """Lengths of the tokens of a byte-level tokenizer.

    Args:
        sizes: bytes of each token, int64 [ids].
        composes: the tokenizer changes a text that is not in Unicode's form NFC.
    """

    sizes: np.ndarray
    composes: bool

    def first_tokens(self, text: str, ids: "array[int]", places: list[int]) -> list[int] | None:
        """Return the token that begins at each place, the number of tokens for the end of the text.

        Args:
            text: what was tokenised.
            ids: its tokens.
            places: numbers of characters before each place.

        Returns:
            None if that is not certain, as where a special token takes up blanks, or if no token begins at some place.
        """
        if self.composes and not unicodedata.is_normalized("NFC", text):
            return None
        ends = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(self.sizes.take(np.frombuffer(ids, np.uint32)), out=ends[1:])
        at = np.array(places if text.isascii() else [len(text[:place].encode()) for place in places])
        if ends[-1] != (len(text) if text.isascii() else len(text.encode())):
            return None
        found = np.searchsorted(ends, at)
        return found.tolist() if (ends[found] == at).all() else None


def token_bytes(tokenizer: "tokenizers.Tokenizer") -> TokenBytes | None:
    """Return the lengths of a tokenizer's tokens; None unless they are those of the text that they stand for."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    model, vocab = tokenizer.model, tokenizer.get_vocab()
    normalizers, cutting = list(steps_of(tokenizer.normalizer)), list(steps_of(tokenizer.pre_tokenizer))
    byte_levels = [step for step in cutting if step["type"] == "ByteLevel"]
    if (
        not isinstance(model, BPE)
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
        or not vocab.keys() >= set(ByteLevel.alphabet())  # so no byte is left out, or becomes an unknown token
        or not {step["type"] for step in normalizers} <= {"NFC"}
        or not {step["type"] for step in cutting} <= set(CUTTING)
        or len(byte_levels) != 1
        or byte_levels[0]["add_prefix_space"]
    ):
        return None
    sizes = np.zeros(max(vocab.values()) + 1, np.int64)
    sizes[np.fromiter(vocab.values(), np.int64, len(vocab))] = np.fromiter(map(len, vocab), np.int64, len(vocab))
    for i, token in tokenizer.get_added_tokens_decoder().items():
        content = unicodedata.normalize("NFC", token.content) if normalizers else token.content
        sizes[i] = 0 if token.lstrip or token.rstrip else len(content.encode())  # it may take up blanks
    return TokenBytes(sizes, bool(normalizers))


def steps_of(component: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer or a pre-tokenizer, each with its type and options."""
    todo = [] if component is None else [json.loads(component.__getstate__())]
    while todo:
        step = todo.pop(0)
        if step["type"] == "Sequence":
            todo = step.get("normalizers", step.get("pretokenizers", [])) + todo
        else:
            yield step
