"""Read JSON values from a file that does not hold one per line: an array, or a sequence of values.

Imports nothing heavy, since every worker process of `prepare` imports this module.
"""

import json
import re
from collections.abc import Iterator
from typing import Literal, TextIO

from distill_nemo.data.conversations import JSON_DECODER, RecordError, is_message
from distill_nemo.runtime.files import why_unreadable

CHUNK_CHARACTERS = 1 << 20
HEAD_CHARACTERS = 1 << 16  # read to find out what a file holds, and more if its first value is larger
MAX_WORD = 16  # characters that mean nothing until they are whole, such as -Infinity and \ud83d\ude00
BROKEN = (ValueError, RecursionError)  # raised for broken JSON, for huge integers, and for brackets in brackets
PLAIN = json.JSONDecoder()
BLANK = re.compile(r"[ \t\r\n]*")


def json_layout(file: TextIO) -> Literal["jsonl", "json", "lists"]:
    """Return how a file holds its records.

    Its first value tells: one per line (jsonl); as elements of an array, or objects over several lines (json); or as
    lists of messages over several lines (lists). A value that is broken is a bad record of a line, or ends an array.

    Raises:
        ValueError: if lines end in CR alone.
    """
    scanner = _Scanner(file, HEAD_CHARACTERS)
    begins_list = scanner.peek() == "["
    try:
        if begins_list and not scanner.holds_value():
            scanner.skip("[")
            if not is_message(scanner.value()):
                return "json"
            file.seek(0)
            scanner = _Scanner(file, HEAD_CHARACTERS)
        value, text = scanner.value_and_text()
    except BROKEN:
        return "json" if begins_list else "jsonl"
    following = scanner.following(2)
    more = bool(scanner.peek())
    if following[:1] == "\r" and following != "\r\n" and more:
        raise ValueError("its lines end in CR alone")
    are_messages = isinstance(value, list) and value != [] and all(map(is_message, value))
    if "\n" in text:
        return "lists" if are_messages else "json"
    is_line = are_messages or (more and following[:1] in ("\r", "\n"))
    return "json" if begins_list and not is_line else "jsonl"


def json_values(file: TextIO, of_array: bool = True) -> Iterator[object]:
    """Yield the values in `file`, with only one value and a chunk of text in memory; an error for a bad one.

    Args:
        file: an array or a sequence of values.
        of_array: yield the elements of an array, and not the array.

    Raises:
        ValueError: if the JSON is broken or truncated, with the number of the last value before that.
    """
    scanner, number = _Scanner(file, CHUNK_CHARACTERS, JSON_DECODER), 0
    try:
        for value in _elements(scanner) if of_array and scanner.skip("[") else _sequence(scanner):
            yield value
            number += 1
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is broken or cut short after record {number}: {error.msg}") from None
    except BROKEN as error:
        raise ValueError(f"the record after record {number} is not read: {why_unreadable(error)}") from None


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

    def __init__(self, file: TextIO, chunk: int, decoder: json.JSONDecoder = PLAIN) -> None:
        self.file, self.chunk, self.decoder, self.text, self.at = file, chunk, decoder, "", 0

    def peek(self) -> str:
        """Return the next character that is not blank; "" at the end."""
        while True:
            blank = BLANK.match(self.text, self.at)
            self.at = blank.end() if blank else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            self.text, self.at = self.file.read(self.chunk), 0
            if not self.text:
                return ""

    def skip(self, character: str) -> bool:
        """Skip `character` if it is the next one. Return True if it was."""
        there = self.peek() == character
        self.at += there
        return there

    def following(self, count: int) -> str:
        """Return the next characters, blanks included."""
        if len(self.text) - self.at < count:
            self._grow()
        return self.text[self.at : self.at + count]

    def holds_value(self) -> bool:
        """Return True if the text in memory holds all of the next value."""
        try:
            PLAIN.raw_decode(self.text, self.at)
        except BROKEN:
            return False
        return True

    def value(self) -> object:
        """Decode the next value."""
        return self.value_and_text()[0]

    def value_and_text(self) -> tuple[object, str]:
        """Decode the next value, doubling the text until it holds the value's end, or an error before the text's."""
        self.peek()
        while True:
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - MAX_WORD
                if not (may_go_on and self._grow()):
                    raise
            else:
                if end < len(self.text) or not self._grow():  # a number at the end of the text may continue
                    begin, self.at = self.at, end
                    return value, self.text[begin:end]

    def _decode(self) -> tuple[object, int]:
        """Return the next value, or what the decoder says is wrong with it, and where it ends."""
        try:
            return self.decoder.raw_decode(self.text, self.at)
        except RecordError as error:
            return error, PLAIN.raw_decode(self.text, self.at)[1]

    def _grow(self) -> bool:
        kept = self.text[self.at :]
        more = self.file.read(max(self.chunk, len(kept)))
        self.text, self.at = kept + more, 0
        return bool(more)
