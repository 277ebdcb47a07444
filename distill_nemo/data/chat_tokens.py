"""Tokens of conversations, and which of them count."""

import functools
import unicodedata
from array import array
from typing import TYPE_CHECKING, NamedTuple

from distill_nemo.data.answers import Range
from distill_nemo.data.chat_template import ChatTemplate, LossOn, Rendered
from distill_nemo.data.conversations import Conversation, RecordError
from distill_nemo.data.template_files import read_templates
from distill_nemo.data.token_places import token_bytes
from distill_nemo.data.tokenizer import Tokenizer, encoder_of

if TYPE_CHECKING:
    import tokenizers

CANNOT_ENCODE = "the tokenizer cannot encode a conversation"


class Chat(NamedTuple):
    """Rendering of conversations: the template, and whose tokens count."""

    template: ChatTemplate
    loss_on: LossOn


class Tokens(NamedTuple):
    """A document's tokens.

    Args:
        ids: all of them.
        counted: ranges of tokens that count; None if all do.
        last_apart: the last range is the assistant's last turn, and none adjoins it.
        without_reasoning: number of answers that count without their reasoning, which the template leaves out.
    """

    ids: "array[int]"
    counted: list[Range] | None = None
    last_apart: bool = True
    without_reasoning: int = 0


def chat_of(tokenizer: Tokenizer, loss_on: LossOn, file: str | None) -> Chat:
    """Return the rendering by a tokenizer's chat template, or the one in a file.

    Raises:
        ValueError: if there is no template, it is not valid Jinja, or the tokenizer cannot say where in a text its
            tokens are.
    """
    if tokenizer.fast is None:
        raise ValueError(f"{tokenizer.path}: conversations need a fast tokenizer, with tokenizer.json")
    stated = tokenizer.special_tokens.items()
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in stated}
    named = {name: token for name, token in named.items() if name.endswith("_token") and isinstance(token, str)}
    added = [token.content for token in tokenizer.fast.get_added_tokens_decoder().values()]
    special = sorted(token for token in added if token.strip())  # Gemma's added tokens include line breaks
    template = ChatTemplate(*read_templates(tokenizer.path, file), named, tuple(special))
    template.check(f"{file or tokenizer.path}")
    return Chat(template, loss_on)


def chat_tokens(fast: str, chat: Chat, conversations: list[Conversation]) -> list[Tokens | RecordError]:
    """Tokenise conversations, each with an error in its place if it cannot be rendered.

    Args:
        fast: file of a fast tokenizer.
        chat: template and tokens that count.
        conversations: any number.
    """
    rendered = [_rendered(chat, conversation) for conversation in conversations]
    encoder = chat_encoder(fast)
    encoded = iter(encoder.encode([found.text for found in rendered if isinstance(found, Rendered)]))
    special = chat.template.special
    return [
        _tokens(encoder, next(encoded), found, special) if isinstance(found, Rendered) else found for found in rendered
    ]


def _rendered(chat: Chat, conversation: Conversation) -> Rendered | RecordError:
    try:
        return chat.template.counted(conversation, chat.loss_on)
    except RecordError as error:
        return error


def _tokens(
    encoder: "_Encoder", encoded: "_Encoded", rendered: Rendered, special: tuple[str, ...]
) -> Tokens | RecordError:
    try:
        ranges = encoder.token_ranges(rendered, encoded, special)
    except RecordError as error:
        return error
    if all(start == stop for start, stop in ranges):
        return RecordError("has no token that counts, as the chat template renders it, so there is no answer to learn")
    stops = [stop for _, stop in ranges[:-1]]
    last_apart = rendered.by_turn and ranges[-1][0] not in stops
    return Tokens(encoded.ids, ranges, last_apart, rendered.without_reasoning)


class _Encoded(NamedTuple):
    """Ids of a text, with the library's offsets if the tokenizer's lengths of tokens do not tell where they are."""

    ids: "array[int]"
    offsets: "tokenizers.Encoding | None" = None


class _Encoder:
    """Encoder of conversations that knows where in a text its tokens are.

    Args:
        tokenizer: belongs to this encoder, which changes it.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        from tokenizers.processors import TemplateProcessing

        # Its own may cut blanks from the positions of tokens (ByteLevel's trim_offsets). It adds no tokens here.
        tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
        self._ids_of = encoder_of(tokenizer, CANNOT_ENCODE)
        self._tokenizer = tokenizer
        self._bytes = token_bytes(tokenizer)

    def encode(self, texts: list[str]) -> list[_Encoded]:
        """Tokenise texts.

        Raises:
            ValueError: if the tokenizer lacks a token.
        """
        if self._bytes is not None:
            return [_Encoded(ids) for ids in self._ids_of(texts)]
        try:
            found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library's only class of errors
            raise ValueError(f"{CANNOT_ENCODE}: {error}") from None
        return [_Encoded(array("I", encoding.ids), encoding) for encoding in found]

    def token_ranges(self, rendered: Rendered, encoded: _Encoded, special: tuple[str, ...]) -> list[Range]:
        """Return the tokens of the characters that count.

        Raises:
            RecordError: if a token is on both sides of a boundary.
        """
        text, places = rendered.text, [place for range_ in rendered.counted for place in range_]
        firsts = None if self._bytes is None else self._bytes.first_tokens(text, encoded.ids, places)
        if firsts is None:
            encoding = encoded.offsets or self._tokenizer.encode(text, add_special_tokens=False)
            firsts = [_first_token(encoding, text, special, place) for place in places]
        return list(zip(firsts[::2], firsts[1::2], strict=True))


def _first_token(encoding: "tokenizers.Encoding", text: str, special: tuple[str, ...], position: int) -> int:
    """Return the first token at or after a character. Blanks that a special token takes up are left out.

    Raises:
        RecordError: if a token begins before the character and ends after it.
    """
    for at in range(position, len(text)):  # a normaliser may have removed characters
        token = encoding.char_to_token(at)
        if token is None:
            if at == position and len(unicodedata.normalize("NFC", text[at - 1 : at + 1])) == 1:
                raise _astride(text, at)
            continue
        first, past = encoding.token_to_chars(token) or (0, len(text))
        if first >= position:
            return token
        if text[first:position].strip() in special and not text[position:past].strip():
            continue  # it ends before the character, and takes up the blanks behind it, as Phi-3's do
        raise _astride(text, at)
    return len(encoding.ids)


def _astride(text: str, at: int) -> RecordError:
    return RecordError(
        f"has a token on both sides of a boundary of the assistant's part, at {text[max(at - 8, 0) : at + 8]!r}: "
        "remove blanks there, or change the chat template so that a special token or a line break is there"
    )


@functools.cache
def chat_encoder(fast: str) -> _Encoder:
    """Return the encoder of conversations of a saved fast tokenizer."""
    import tokenizers

    return _Encoder(tokenizers.Tokenizer.from_file(fast))
