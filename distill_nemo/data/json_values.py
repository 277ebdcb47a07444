"""Read JSON values from a file that does not hold one per line: an array, or a sequence of values."""

import json
import re
from collections.abc import Iterator
from typing import TextIO

CHUNK_CHARACTERS = 1 << 20
MAX_WORD = 16  # characters that mean nothing until they are whole, such as -Infinity and \ud83d\ude00
BLANK = re.compile(r"[ \t\r\n]*")


def json_values(file: TextIO) -> Iterator[object]:
    """Yield the values in `file`, with only one value and a chunk of text in memory.

    Raises:
        ValueError: if the JSON is broken or truncated, with the number of the last value before that.
    """
    scanner, number = _Scanner(file), 0
    try:
        for value in _elements(scanner) if scanner.skip("[") else _sequence(scanner):
            yield value
            number += 1
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is broken or cut short after record {number}: {error.msg}") from None


def _sequence(scanner: "_Scanner") -> Iterator[object]:
    while scanner.peek():
        yield scanner.value()


def _elements(scanner: "_Scanner") -> Iterator[object]:
    if scanner.peek() != "]":
        yield scanner.value()
        while scanner.skip(","):
            yield scanner.value()
    if not scanner.skip("]"):
        raise json.JSONDecodeError('"," or "]" is missing', "", 0)
    if scanner.peek():
        raise json.JSONDecodeError("something follows the array", "", 0)


class _Scanner:
    """Position in a text of which only a part is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at = file, "", 0

    def peek(self) -> str:
        """Return the next character that is not blank; "" at the end."""
        while True:
            blank = BLANK.match(self.text, self.at)
            self.at = blank.end() if blank else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            self.text, self.at = self.file.read(CHUNK_CHARACTERS), 0
            if not self.text:
                return ""

    def skip(self, character: str) -> bool:
        """Skip `character` if it is the next one. Return True if it was."""
        there = self.peek() == character
        self.at += there
        return there

    def value(self) -> object:
        """Decode the next value, doubling the text until it holds the value's end, or an error before the text's."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - MAX_WORD
                if not (may_go_on and self._grow()):
                    raise
            else:
                if end < len(self.text) or not self._grow():  # a number at the end of the text may continue
                    self.at = end
                    return value

    def _grow(self) -> bool:
        kept = self.text[self.at :]
        more = self.file.read(max(CHUNK_CHARACTERS, len(kept)))
        self.text, self.at = kept + more, 0
        return bool(more)
