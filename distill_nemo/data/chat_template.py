"""Render conversations with the tokenizer's own chat template, and find the characters that the assistant wrote.

A template with `{% generation %}` markers says which they are. For another, they are the difference of two renderings:
up to the assistant's turn with the prompt for an answer, and up to its end. The difference is used only if each
rendering is the beginning of the next one. Some templates drop the reasoning of earlier turns, so it is not.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill_nemo.data.conversations import HAS_ZEROS, ZEROS, Conversation, Message, RecordError, called
from distill_nemo.runtime.files import read_object_if_any

LossOn = Literal["assistant", "last", "all"]
Range = tuple[int, int]
MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
THOUGHT = re.compile(r"</?think>")
FOR_TOOLS = "tool_use"  # name of a second template, which `apply_chat_template` takes for conversations with tools
MAX_TEMPLATE_BYTES = 1 << 20
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
            ranges = [self._difference(conversation, i, text) for i in learnt]
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
            _check_answers([(i, messages[i]) for i in learnt], [text[start:stop] for start, stop in ranges])
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

    def _difference(self, conversation: Conversation, turn: int, whole: str) -> Range:
        is_last = turn == len(conversation.messages) - 1
        through = whole if is_last else self._render(conversation, turn + 1)
        start = len(self._before(conversation, turn, through))
        ends = [start + end for end in self._special_ends(through[start:])]
        content = conversation.messages[turn]["content"].strip()
        spoken = through.find(content, start) + len(content)  # special tokens of the content do not end the turn
        ends = [end for end in ends if end > spoken] or ends[:1] or [len(through)]
        texts = [whole]
        if is_last and len(ends) > 1:  # such as Phi-3's, which ends a conversation with one more token than a turn
            texts = [self._continued(conversation), whole]
        for text in texts:
            for end in ends:
                if text.startswith(through[:end]):
                    return start, end
        raise _uncertain(turn, "is answered" if is_last else "follows")

    def _before(self, conversation: Conversation, turn: int, through: str) -> str:
        """Return the text up to a turn, with the prompt for an answer; for one without reasoning, if there is one."""
        has_reasoning = "reasoning_content" in conversation.messages[turn]
        for options in ({},) if has_reasoning else ({"enable_thinking": False}, {}):
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
        raise _uncertain(turn, "is answered")

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


def _check_answers(learnt: list[tuple[int, Message]], texts: list[str]) -> None:
    """Refuse a rendering that leaves out a part of an answer: a template may have no place for calls or reasoning."""
    if len(texts) != len(learnt):
        texts = ["".join(texts)] * len(learnt)
    for (i, message), text in zip(learnt, texts, strict=True):
        names = [str(called(call).get("name")) for call in message.get("tool_calls", [])]
        shown = {
            "content": all(_shows(text, piece) for piece in THOUGHT.split(message["content"])),
            "reasoning": _shows(text, message.get("reasoning_content", "")),
            "tool_calls": all(text.count(name) >= names.count(name) for name in names),
        }
        for part, is_shown in shown.items():
            if not is_shown:
                raise RecordError(
                    f"has {part} in message {i} (from 0) that the chat template leaves out: drop it, or pass a "
                    "chat_template that writes it"
                )


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


def _uncertain(turn: int, cause: str) -> RecordError:
    return RecordError(
        f"is rendered by the chat template so that the text of message {turn} (from 0) depends on what {cause}, so the "
        f"assistant's part is not certain; {'set loss_on=last, or ' if cause == 'follows' else ''}{WITH_MARKERS}"
    )


@functools.cache
def _has_markers(source: str) -> bool:
    return bool(MARKER.search(COMMENT.sub("", source)))


def read_templates(directory: str, file: str | None) -> tuple[str, str | None]:
    """Return the chat template in a file, or else beside a tokenizer, and the one for tools, if that is another.

    Raises:
        ValueError: if there is none.
    """
    if file is not None:
        return _read(Path(file).expanduser()), None
    path = Path(directory)
    if (beside := path / "chat_template.jinja").is_file():
        tools = path / "additional_chat_templates" / f"{FOR_TOOLS}.jinja"
        return _read(beside), _read(tools) if tools.is_file() else None
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_object_if_any(path / name).get("chat_template")
        tools = None
        if isinstance(found, list):  # several, by name
            named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
            found, tools = named.get("default"), named.get(FOR_TOOLS)
        if isinstance(found, str):
            return found, tools
    raise ValueError(
        f"the tokenizer {directory} has no chat template, so conversations cannot be rendered: use the tokenizer of an "
        "instruct model, or pass chat_template=FILE with a Jinja template"
    )


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"no such chat template: {path}")
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise ValueError(f"the chat template {path} has more than {MAX_TEMPLATE_BYTES:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {path} is not UTF-8: {error}") from None
