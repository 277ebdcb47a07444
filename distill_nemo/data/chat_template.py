"""Render conversations with the tokenizer's own chat template, and find the characters that the assistant wrote.

A template with `{% generation %}` markers says which they are. For another, they are the difference of two renderings:
up to the assistant's turn with the prompt for an answer, and up to its end. The difference is used only if each
rendering is the beginning of the next one. Some templates drop the reasoning of earlier turns, so it is not.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from distill_nemo.data.conversations import Conversation, RecordError
from distill_nemo.runtime.files import read_object_if_any

LossOn = Literal["assistant", "last", "all"]
Range = tuple[int, int]
MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
BLOCK = re.compile(r"\{%[-+]?\s*(end)?(?:(generation)\b|(?:macro|call|filter)\b|set\b(?=[^=]*?%\}))")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
FOR_TOOLS = "tool_use"  # name of a second template, which `apply_chat_template` takes for conversations with tools
MAX_TEMPLATE_BYTES = 1 << 20


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

    def counted(self, conversation: Conversation, loss_on: LossOn) -> tuple[str, list[Range]]:
        """Return the rendered text, and the ranges of characters whose tokens count.

        Raises:
            RecordError: if the template refuses the conversation, or does not show which text is the assistant's.
        """
        markers = bool(MARKER.search(self._source(conversation)))
        text, marked = self._render(conversation, len(conversation.messages), marked=markers)
        if loss_on == "all":
            return text, [(0, len(text))]
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if marked is not None:
            if loss_on == "last" and len(marked) != len(turns):
                raise RecordError(
                    f"has {len(turns)} messages of the assistant, and the chat template marks {len(marked)} texts, so "
                    "the last message's text is not certain; mark one text for each message, or set loss_on=assistant"
                )
            return text, marked[-1:] if loss_on == "last" else marked
        return text, [self._difference(conversation, i, text) for i in (turns[-1:] if loss_on == "last" else turns)]

    def _difference(self, conversation: Conversation, turn: int, whole: str) -> Range:
        try:
            before, _ = self._render(conversation, turn, prompt=True)
        except RecordError:
            if turn:
                raise
            raise RecordError(
                "begins with the assistant, and the chat template needs a message before an answer: set loss_on=last, "
                "or pass a chat_template with {% generation %} markers"
            ) from None
        through, _ = self._render(conversation, turn + 1)
        if not (through.startswith(before) and whole.startswith(through)):
            last = turn == len(conversation.messages) - 1
            raise RecordError(
                f"is rendered by the chat template so that the text of message {turn} (from 0) depends on what "
                f"{'is answered' if last else 'follows'}, so the assistant's part is not certain; "
                + ("" if last else "set loss_on=last, or ")
                + "pass a chat_template with {% generation %} markers"
            )
        return len(before), len(before) + self._end_of_turn(through[len(before) :])

    def _end_of_turn(self, answer: str) -> int:
        """Return the end of the last special token if only blanks follow it, else the end of the answer."""
        end = max((answer.rfind(token) + len(token) for token in self.special if token in answer), default=0)
        return end if end and not answer[end:].strip() else len(answer)

    def _source(self, conversation: Conversation) -> str:
        return self.source if conversation.tools is None else self.with_tools or self.source

    def _render(
        self, conversation: Conversation, count: int, *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[Range] | None]:
        """Render the first messages. Return the ranges that the template marks, if `marked`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            arguments: dict[str, Any] = {**self.named, "tools": conversation.tools}
            rendered = render_jinja_template(
                conversations=[conversation.messages[:count]],
                chat_template=self._source(conversation),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **arguments,
            )
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RecordError(f"is refused by the chat template: {reason:.300}") from None
        (text,), ranges = cast("tuple[list[str], list[list[Range]]]", rendered)
        return text, [(start, stop) for start, stop in ranges[0]] if marked else None


def read_templates(directory: str, file: str | None) -> tuple[str, str | None]:
    """Return the chat template in a file, or else beside a tokenizer, and the one for tools, if that is another.

    Raises:
        ValueError: if there is none, or its markers are where their text cannot be found.
    """
    for source in filter(None, found := _find(directory, file)):
        if _marks_inside_a_block(source):
            raise ValueError(
                "the chat template has {% generation %} inside a macro, set, call or filter block, from where "
                "transformers cannot tell which text of the whole is marked: pass a chat_template with it outside"
            )
    return found


def _find(directory: str, file: str | None) -> tuple[str, str | None]:
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


def _marks_inside_a_block(source: str) -> bool:
    depth = 0
    for block in BLOCK.finditer(COMMENT.sub("", source)):
        end, marker = block.groups()
        if marker and depth and not end:
            return True
        depth += 0 if marker else -1 if end else 1
    return False


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"no such chat template: {path}")
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise ValueError(f"the chat template {path} has more than {MAX_TEMPLATE_BYTES:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {path} is not UTF-8: {error}") from None
