"""Render conversations with the tokenizer's own chat template, and find the characters that the assistant wrote.

A template with `{% generation %}` markers says which they are. For another, they are the difference of two renderings:
up to the assistant's turn with the prompt for an answer, and up to its end. The difference is used only if each
rendering is the beginning of the next one. Some templates drop the reasoning of earlier turns, so it is not. There, two
stand-ins in place of the answer show what the whole conversation's rendering has around it.
"""

import contextlib
import functools
import itertools
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from distill_nemo.data.conversations import HAS_ZEROS, ZEROS, Conversation, Message, RecordError, called

LossOn = Literal["assistant", "last", "all"]
Range = tuple[int, int]
MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
THOUGHT = re.compile(r"</?think>")
PROMPTS = ({"enable_thinking": False}, {})  # for an answer: without reasoning, and as the template has it
STAND_INS = ("qxzj", "7531908642")  # repeated until new to a conversation; no template has a rule for these words
WITH_MARKERS = "pass a chat_template with {% generation %} markers"


class Rendered(NamedTuple):
    """A conversation's text.

    Args:
        text: all of it.
        counted: ranges of characters whose tokens count.
        by_turn: each range is one turn of the assistant, and the last one is the conversation's last.
    """

    text: str
    counted: list[Range]
    by_turn: bool


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
        self._check_asked(conversation, text)
        if loss_on == "all":
            return Rendered(text, [(0, len(text))], False)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learnt = [i for i in (turns[-1:] if loss_on == "last" else turns) if messages[i].get("train", True)]
        by_turn = learnt[-1:] == turns[-1:]
        if not _has_markers(self._source(conversation)):
            ranges = [self._answer(conversation, i, text) for i in learnt]
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
        if ranges:
            self._check_answers(conversation, learnt, [text[start:stop] for start, stop in ranges])
        return Rendered(text, ranges, by_turn)

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

    def _answer(self, conversation: Conversation, turn: int, whole: str) -> Range:
        """Return where a turn of the assistant is in the text of the whole conversation."""
        found = self._difference(conversation, turn, whole)
        if found is None:
            with contextlib.suppress(RecordError):  # the template refuses a stand-in
                found = self._between(conversation, turn, whole)
        if found is None:
            is_last = turn == len(conversation.messages) - 1
            raise RecordError(
                f"is rendered by the chat template so that the text of message {turn} (from 0) depends on what "
                f"{'is answered' if is_last else 'follows'}, so the assistant's part is not certain; "
                f"{'' if is_last else 'set loss_on=last, or '}{WITH_MARKERS}"
            )
        return found

    def _difference(self, conversation: Conversation, turn: int, whole: str) -> Range | None:
        """Return the difference of two renderings, up to a turn and up to its end; None if they differ before it."""
        is_last = turn == len(conversation.messages) - 1
        through = whole if is_last else self._render(conversation, turn + 1)
        before = self._before(conversation, turn, through)
        if before is None:
            return None
        start = len(before)
        ends = [start + end for end in self._special_ends(through[start:])]
        content = conversation.messages[turn]["content"].strip()
        spoken = through.find(content, start) + len(content)  # special tokens of the content do not end the turn
        ends = [end for end in ends if end > spoken] or ends[:1] or [len(through)]
        texts = [whole]
        if is_last and len(ends) > 1:  # such as Phi-3's, which ends a conversation with one more token than a turn
            texts = [self._continued(conversation), whole]
        matching = (end for text in texts for end in ends if text.startswith(through[:end]))
        return next(((start, end) for end in matching), None)

    def _between(self, conversation: Conversation, turn: int, whole: str) -> Range | None:
        """Return the text between what is around two stand-ins for an answer; None if it is not certain.

        It begins where the text no longer follows the prompt for an answer, or the beginning of that prompt, and ends
        with the special token that also ends the turn where nothing follows.
        """
        stand_ins = [_new_to(whole, word) for word in STAND_INS]
        around = {self._around(conversation, turn, stand_in) for stand_in in stand_ins}
        until = Conversation(conversation.messages[: turn + 1], conversation.tools)
        _, rest = self._around(until, turn, stand_ins[0])
        head, tail = around.pop()
        end = self._first_special(tail.lstrip())
        if around or not end or not whole.endswith(tail) or not rest.lstrip().startswith(end):
            return None
        before = self._render(conversation, turn)
        words = min(_num_shared(whole, head), len(whole) - len(tail))
        for options in PROMPTS:
            prompt = self._render(conversation, turn, add_generation_prompt=True, **options)
            asked = prompt.removeprefix(before)
            opening = self._first_special(asked)
            begin = len(before) if whole.startswith(before) else whole.rfind(opening, 0, words) if opening else -1
            start = begin + _num_shared(whole[begin:words], asked)
            if prompt.startswith(before) and begin >= 0 and (start == words or start == begin + len(asked)):
                return start, len(whole) - len(tail.lstrip()) + len(end)
        return None

    def _around(self, conversation: Conversation, turn: int, stand_in: str) -> tuple[str, str]:
        """Return the text before and after a turn of which a stand-in is the content."""
        messages = list(conversation.messages)
        messages[turn] = {"role": "assistant", "content": stand_in}
        text = self._render(Conversation(messages, conversation.tools), len(messages))
        head, _, tail = text.partition(stand_in)
        return head, tail

    def _before(self, conversation: Conversation, turn: int, through: str) -> str | None:
        """Return the text up to a turn with the prompt for an answer; None if no prompt is the beginning of the turn.

        For an answer without reasoning, the prompt for one is taken, if there is one.
        """
        has_reasoning = "reasoning_content" in conversation.messages[turn]
        for options in PROMPTS[has_reasoning:]:
            try:
                before = self._render(conversation, turn, add_generation_prompt=True, **options)
            except RecordError:
                if turn:
                    raise
                raise RecordError(
                    "begins with the assistant, and the chat template needs a message before an answer: set "
                    f"loss_on=last, or {WITH_MARKERS}"
                ) from None
            if through.startswith(before):
                return before
        return None

    def _first_special(self, text: str) -> str:
        """Return the special token that a text begins with; "" if there is none."""
        return max(filter(text.startswith, self.special), key=len, default="")

    def _special_ends(self, answer: str) -> list[int]:
        """Return where the special tokens at the end of an answer end, the last one first; blanks are left out."""
        ends, rest = [], answer.rstrip()
        while rest.endswith(self.special):
            ends.append(len(rest))
            token = max((token for token in self.special if rest.endswith(token)), key=len)
            rest = rest[: -len(token)].rstrip()
        return ends

    def _continued(self, conversation: Conversation) -> str:
        """Return the text of a conversation that goes on; empty if the template refuses it."""
        following = [*conversation.messages, {"role": "user", "content": "?"}]
        try:
            return self._render(Conversation(following, conversation.tools), len(following))
        except RecordError:
            return ""

    def _check_asked(self, conversation: Conversation, text: str) -> None:
        """Refuse a rendering that leaves out a tool, or a message that is not the assistant's."""
        names = [str(called(tool).get("name")) for tool in conversation.tools or []]
        if names and not ("tools" in self._source(conversation) and all(name in text for name in names)):
            raise RecordError("has tools that the chat template leaves out: drop them, or pass a chat_template")
        for i, message in enumerate(conversation.messages):
            if message["role"] != "assistant" and not _shows(text, message["content"]):
                raise RecordError(f"has a message {i} (from 0, {message['role']}) that the chat template leaves out")

    def _check_answers(self, conversation: Conversation, learnt: list[int], texts: list[str]) -> None:
        """Refuse a rendering that leaves out a part of an answer: a template may have no place for calls or reasoning.

        Reasoning may be missing, with no empty thought in its place, if the template writes it where nothing follows.
        """
        if len(texts) != len(learnt):
            texts = ["".join(texts)] * len(learnt)
        for i, text in zip(learnt, texts, strict=True):
            left_out = _left_out(conversation.messages[i], text)
            if left_out == ["reasoning"] and i < len(conversation.messages) - 1 and not THOUGHT.search(text):
                alone = self._render(conversation, i + 1).removeprefix(self._render(conversation, i))
                left_out = _left_out(conversation.messages[i], alone)
            if left_out:
                raise RecordError(
                    f"has {left_out[0]} in message {i} (from 0) that the chat template leaves out: drop it, or pass a "
                    "chat_template that writes it"
                )

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
                text = template.render(messages=messages, **given)
            except TypeError:  # DeepSeek's templates join the arguments of a call, as text, to other text
                text = template.render(messages=[_with_text_arguments(message) for message in messages], **given)
            text.encode()
        except UnicodeEncodeError:
            raise RecordError("holds half of a surrogate pair, or is not UTF-8") from None
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RecordError(f"is refused by the chat template: {reason:.300}") from None
        if ZEROS in text:
            raise RecordError(HAS_ZEROS)
        return text


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


def _num_shared(text: str, other: str) -> int:
    """Return the number of characters at the beginning of two texts that are the same."""
    if text.startswith(other):
        return len(other)
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (one, two) in pairs if one != two), len(text))


def _new_to(text: str, word: str) -> str:
    """Return repetitions of a word that a text does not have."""
    return next(word * count for count in itertools.count(2) if word * count not in text)


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
