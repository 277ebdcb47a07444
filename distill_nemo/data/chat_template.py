"""Render conversations with the tokenizer's own chat template, and find the characters that the assistant wrote.

A template with `{% generation %}` markers says which they are. For another, `answers` finds them.
"""

import functools
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from distill_nemo.data.answers import AnswerFinder, Range
from distill_nemo.data.conversations import HAS_ZEROS, ZEROS, Conversation, Message, RecordError, called

LossOn = Literal["assistant", "last", "all"]
MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
THOUGHT = re.compile(r"</?think>")


class Rendered(NamedTuple):
    """A conversation's text.

    Args:
        text: all of it.
        counted: ranges of characters whose tokens count.
        by_turn: each range is one turn of the assistant, and the last one is the conversation's last.
        without_reasoning: number of ranges without the answer's reasoning, which the template leaves out there.
    """

    text: str
    counted: list[Range]
    by_turn: bool
    without_reasoning: int = 0


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and what it is given.

    Args:
        source: the template.
        with_tools: the template of conversations with tools; None for `source`.
        named: special tokens by name, such as "eos_token".
        special: all special tokens; the last one of a turn ends it.
    """

    source: str
    with_tools: str | None
    named: dict[str, str]
    special: tuple[str, ...]

    def counted(self, conversation: Conversation, loss_on: LossOn) -> Rendered:
        """Render a conversation.

        Raises:
            RecordError: if the template refuses the conversation, leaves out a part of it, or does not show which text
                is the assistant's.
        """
        messages = conversation.messages
        text = self._render(conversation, len(messages))
        _check_characters(text)
        self._check_asked(conversation, text)
        if loss_on == "all":
            return Rendered(text, [(0, len(text))], False)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learnt = [i for i in (turns[-1:] if loss_on == "last" else turns) if messages[i].get("train", True)]
        by_turn = learnt[-1:] == turns[-1:]
        if not _has_markers(self._source(conversation)):
            finder = AnswerFinder(self._render, self.special)
            ranges = [finder.find(conversation, i, text) for i in learnt]
        else:
            ranges = self._marked(conversation, text)
            if len(ranges) == len(turns):
                ranges = [ranges[turns.index(i)] for i in learnt]
            elif learnt != turns:
                raise RecordError(
                    f"has {len(turns)} messages of the assistant, and the chat template marks {len(ranges)} texts, so "
                    "the text of one message is not certain; mark one text for each message"
                )
            by_turn &= len(ranges) == len(learnt)
        texts = [text[start:stop] for start, stop in ranges]
        without = self._check_answers(conversation, learnt, texts) if ranges else 0
        return Rendered(text, ranges, by_turn, without)

    def check(self, path: str) -> None:
        """Refuse a template that is not valid Jinja, once and not for every conversation.

        Raises:
            ValueError: naming `path` and the line.
        """
        import jinja2

        from distill_nemo.data.jinja import compiled

        for source in filter(None, (self.source, self.with_tools)):
            try:
                compiled(source, False)
            except jinja2.TemplateSyntaxError as error:
                where = f"{path}: the chat template is not valid Jinja: line {error.lineno}"
                raise ValueError(f"{where}: {error.message}") from None

    def _marked(self, conversation: Conversation, whole: str) -> list[Range]:
        from distill_nemo.data.jinja import START, STOP

        pieces = re.split(f"([{START}{STOP}])", self._render(conversation, len(conversation.messages), marked=True))
        if "".join(pieces[::2]) != whole:
            raise RecordError(
                "is changed by the markers {% generation %} of the chat template, which stand in a block whose text "
                "is changed: pass a chat_template with them outside"
            )
        places, at = [], 0
        for piece in pieces:
            if piece in (START, STOP):
                places.append(at)
            else:
                at += len(piece)
        return list(zip(places[::2], places[1::2], strict=True))

    def _check_asked(self, conversation: Conversation, text: str) -> None:
        """Refuse a rendering that leaves out a tool, or a message that is not the assistant's."""
        names = [str(called(tool).get("name")) for tool in conversation.tools or []]
        if names and not ("tools" in self._source(conversation) and all(name in text for name in names)):
            raise RecordError("has tools that the chat template leaves out: drop them, or pass a chat_template")
        for i, message in enumerate(conversation.messages):
            if message["role"] != "assistant" and not _shows(text, message["content"]):
                raise RecordError(
                    f"has a message {i} (from 0, {message['role']}) that the chat template leaves out: drop it, or "
                    "pass a chat_template that writes it"
                )

    def _check_answers(self, conversation: Conversation, learnt: list[int], texts: list[str]) -> int:
        """Return the number of answers that are rendered without their reasoning.

        Reasoning may be missing, with no empty thought in its place, if the template writes it where nothing follows.

        Raises:
            RecordError: if another part of an answer is left out: a template may have no place for calls or reasoning.
        """
        without = 0
        if len(texts) != len(learnt):
            texts = ["".join(texts)] * len(learnt)
        for i, text in zip(learnt, texts, strict=True):
            left_out = _left_out(conversation.messages[i], text)
            if left_out == ["reasoning"] and i < len(conversation.messages) - 1 and not THOUGHT.search(text):
                alone = self._render(conversation, i + 1).removeprefix(self._render(conversation, i))
                left_out = _left_out(conversation.messages[i], alone)
                without += not left_out
            if left_out:
                raise RecordError(
                    f"has {left_out[0]} in message {i} (from 0) that the chat template leaves out: drop it, or pass a "
                    "chat_template that writes it"
                )
        return without

    def _source(self, conversation: Conversation) -> str:
        return self.source if conversation.tools is None else self.with_tools or self.source

    def _render(self, conversation: Conversation, count: int, *, marked: bool = False, **options: Any) -> str:
        """Render the first messages."""
        from distill_nemo.data.jinja import compiled

        given = {"tools": conversation.tools, "documents": None, "add_generation_prompt": False, **self.named} | options
        messages = conversation.messages[:count]
        try:
            template = compiled(self._source(conversation), marked)
            try:
                return template.render(messages=messages, **given)
            except TypeError:  # DeepSeek's templates join the arguments of a call, as text, to other text
                return template.render(messages=[_with_text_arguments(message) for message in messages], **given)
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RecordError(f"is refused by the chat template: {reason:.300}") from None


def _check_characters(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RecordError("holds half of a surrogate pair, or is not UTF-8") from None
    if ZEROS in text:
        raise RecordError(HAS_ZEROS)


def _left_out(message: Message, text: str) -> list[str]:
    """Return the parts of an answer that a text does not have."""
    *thoughts, words = THOUGHT.split(message["content"])
    names = [str(called(call).get("name")) for call in message.get("tool_calls", [])]
    shown = {
        "content": _shows(text, words),
        "reasoning": all(_shows(text, thought) for thought in [*thoughts, message.get("reasoning_content", "")]),
        "tool_calls": all(text.count(name) >= names.count(name) for name in names),
    }
    return [part for part, is_shown in shown.items() if not is_shown]


def _shows(text: str, part: str) -> bool:
    """Return True if a text has a part, perhaps with other blanks or as a JSON string."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or _unblanked(part) in _unblanked(text)


def _unblanked(text: str) -> str:
    return "".join(text.split())


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = called(call)
        function = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
        calls.append({**call, "function": function} if "function" in call else function)
    return message | {"tool_calls": calls}


@functools.cache
def _has_markers(source: str) -> bool:
    return bool(MARKER.search(COMMENT.sub("", source)))
