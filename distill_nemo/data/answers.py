"""Find an answer of the assistant in the text of a conversation, by comparing renderings of a chat template.

The answer is the difference of two renderings: up to the assistant's turn with the prompt for an answer, and up to its
end. The difference is used only if each rendering is the beginning of the next one. Some templates drop the reasoning
of earlier turns, end them otherwise, or move the tools, so it is not. There, two stand-ins in place of the answer, or
of the function that it calls, show what the whole conversation's text has around it.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distill_nemo.data.conversations import KEPT, REASONING, Conversation, RecordError, called

Range = tuple[int, int]
StandIn = Callable[[Conversation, int, str], Conversation]  # conversation, turn, word
PROMPTS = ({"enable_thinking": False}, {})  # for an answer: without reasoning, and as the template has it
STAND_INS = ("qxzj", "7531908642")  # repeated until new to a conversation; no template has a rule for these words
WITH_MARKERS = "pass a chat_template with {% generation %} markers"


@dataclass(frozen=True)
class AnswerFinder:
    """Places of answers in the text of a template without generation markers.

    Args:
        render: renders the first messages of a conversation, with further options of the template.
        special: all special tokens; the last one of a turn ends it.
    """

    render: Callable[..., str]
    special: tuple[str, ...]

    def find(self, conversation: Conversation, turn: int, whole: str) -> Range:
        """Return where a turn of the assistant is in the text of the whole conversation."""
        found = self._difference(conversation, turn, whole)
        if found is None and "reasoning_content" in conversation.messages[turn]:
            without = _without_reasoning(conversation, turn)
            if self.render(without, len(without.messages)) == whole:  # the template leaves the reasoning out
                found = self._difference(without, turn, whole)
        if found is None:
            for stand_in in (_with_content, _with_called):
                with contextlib.suppress(RecordError):  # the template refuses it
                    found = found or self._between(conversation, turn, whole, stand_in)
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
        through = whole if is_last else self.render(conversation, turn + 1)
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

    def _between(self, conversation: Conversation, turn: int, whole: str, stood_in: StandIn) -> Range | None:
        """Return the text between what is around two stand-ins for an answer; None if it is not certain.

        It begins where the text no longer follows the prompt for an answer, or the beginning of that prompt. What ends
        it counts if it also ends the turn where nothing follows.
        """
        words = [_new_to(whole, word) for word in STAND_INS]
        around = {self._around(stood_in(conversation, turn, word), word) for word in words}
        until = Conversation(conversation.messages[: turn + 1], conversation.tools)
        _, rest = self._around(stood_in(until, turn, words[0]), words[0])
        head, tail = around.pop()
        num_ending = self._num_ending(tail, rest, stood_in is _with_called)
        if around or num_ending is None or not whole.endswith(tail):
            return None
        first = min(_num_shared(whole, head), len(whole) - len(tail))
        for begin, asked in self._prompts(conversation, turn, whole, first):
            start = begin + _num_shared(whole[begin:first], asked)
            if start == first or start == begin + len(asked):
                return start, len(whole) - len(tail) + num_ending
        return None

    def _num_ending(self, tail: str, rest: str, has_calls: bool) -> int | None:
        """Return how much of the text after a stand-in ends the turn; None if that is not certain.

        Args:
            tail: text after the stand-in.
            rest: the same where nothing follows the turn.
            has_calls: the stand-in is the name of a call, of which more follows.
        """
        if has_calls:
            ending = rest.rstrip()
            return len(ending) if ending.endswith(self.special) and tail.startswith(ending) else None
        blanks = len(tail) - len(tail.lstrip())
        end = self._first_special(tail[blanks:])
        if not end:
            return None
        return blanks + len(end) if rest.lstrip().startswith(end) else 0

    def _prompts(self, conversation: Conversation, turn: int, whole: str, first: int) -> Iterator[tuple[int, str]]:
        """Yield places before `first` in the whole text, each with the rest of a prompt for an answer from there on.

        A place is the end of what came before, the prompt's first special token, or the end of the last message's
        content, for which a stand-in shows what follows it.
        """
        before, stand_in = self.render(conversation, turn), _new_to(whole, STAND_INS[0])
        asking = _with_content(conversation, turn - 1, stand_in) if turn else None
        for options in PROMPTS:
            prompt = self.render(conversation, turn, add_generation_prompt=True, **options)
            asked = prompt.removeprefix(before)
            opening = self._first_special(asked)
            if prompt.startswith(before) and whole.startswith(before):
                yield len(before), asked
            elif prompt.startswith(before) and opening and opening in whole[:first]:
                yield whole.rfind(opening, 0, first), asked
            elif asking is not None:
                _, _, following = self.render(asking, len(asking.messages)).partition(stand_in)
                _, _, asked = self.render(asking, turn, add_generation_prompt=True, **options).partition(stand_in)
                if following and whole.endswith(following):
                    yield len(whole) - len(following), asked

    def _around(self, conversation: Conversation, stand_in: str) -> tuple[str, str]:
        """Return the text before and after a stand-in."""
        head, _, tail = self.render(conversation, len(conversation.messages)).partition(stand_in)
        return head, tail

    def _before(self, conversation: Conversation, turn: int, through: str) -> str | None:
        """Return the text up to a turn with the prompt for an answer; None if no prompt is the beginning of the turn.

        For an answer without reasoning, the prompt for one is taken, if there is one.
        """
        has_reasoning = "reasoning_content" in conversation.messages[turn]
        for options in PROMPTS[has_reasoning:]:
            try:
                before = self.render(conversation, turn, add_generation_prompt=True, **options)
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
            return self.render(Conversation(following, conversation.tools), len(following))
        except RecordError:
            return ""


def _with_content(conversation: Conversation, turn: int, content: str) -> Conversation:
    """Return a conversation in which a message is a text alone."""
    messages = list(conversation.messages)
    kept = {name: value for name, value in messages[turn].items() if name in ("role", *KEPT)}
    messages[turn] = kept | {"content": content}
    return Conversation(messages, conversation.tools)


def _with_called(conversation: Conversation, turn: int, name: str) -> Conversation:
    """Return a conversation in which a message's last call is of another function.

    Raises:
        RecordError: if the message has no call.
    """
    messages = list(conversation.messages)
    if not messages[turn].get("tool_calls"):
        raise RecordError("has no call")
    *calls, last = messages[turn]["tool_calls"]
    function = {**called(last), "name": name}
    last = {**last, "function": function} if "function" in last else function
    messages[turn] = messages[turn] | {"tool_calls": [*calls, last]}
    return Conversation(messages, conversation.tools)


def _without_reasoning(conversation: Conversation, turn: int) -> Conversation:
    messages = list(conversation.messages)
    messages[turn] = {name: value for name, value in messages[turn].items() if name not in REASONING}
    return Conversation(messages, conversation.tools)


def _num_shared(text: str, other: str) -> int:
    """Return the number of characters at the beginning of two texts that are the same."""
    if text.startswith(other):
        return len(other)
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (one, two) in pairs if one != two), len(text))


def _new_to(text: str, word: str) -> str:
    """Return repetitions of a word that a text does not have."""
    return next(word * count for count in itertools.count(2) if word * count not in text)
