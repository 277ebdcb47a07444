"""Places of tokens by their lengths are those of the library's offsets, or none."""

import random
from array import array

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from distill_nemo.data.chat_tokens import _first_token
from distill_nemo.data.conversations import RecordError
from distill_nemo.data.token_places import token_bytes

SPECIAL = ["<|start|>", "<|end|>"]
ADDED = [AddedToken("<|taking|>", rstrip=True), AddedToken("\n\n", normalized=False), AddedToken("\u017f\u00e9")]
WORDS = ["the answer", " ", "\n", "\0", "four", "\u00e9", "e\u0301", "\U0001f600", "\u212b", "\u0958", "\u6f22"]
PIECES = [*WORDS, *SPECIAL, *(token.content for token in ADDED), "\u017fe\u0301"]


def byte_level(**options) -> tokenizers.Tokenizer:
    """Return a tokenizer; `options` are its attributes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in options.items():
        setattr(tokenizer, name, value)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the answer is four \U0001f600 "] * 10, trainer)
    tokenizer.add_tokens(ADDED)
    return tokenizer


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_a_token_is_found_where_the_offsets_have_it(normalizer):
    tokenizer, drawn, found = byte_level(normalizer=normalizer), random.Random(1), 0
    places_of = token_bytes(tokenizer)
    assert places_of is not None
    for _ in range(1000):
        text = "".join(drawn.choices(PIECES, k=drawn.randint(1, 12)))
        encoding = tokenizer.encode(text)
        for place in (drawn.randint(0, len(text)), len(text)):
            first = places_of.first_tokens(text, array("I", encoding.ids), [place])
            if first is not None:
                found += 1
                assert first == [_first_token(encoding, text, tuple(SPECIAL), place)], (text, place)
    assert found > 200


CHANGING = {
    "adds a space": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "adds a space, in a sequence": {
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    },
    "writes longer blanks": {
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    },
    "replaces characters": {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])},
    "is not byte-level": {"pre_tokenizer": pre_tokenizers.Metaspace()},
}


@pytest.mark.parametrize("name", CHANGING)
def test_lengths_of_tokens_are_not_taken_from_a_tokenizer_that_changes_the_text(name):
    assert token_bytes(byte_level(**CHANGING[name])) is None


def test_a_token_on_both_sides_of_a_place_begins_at_none():
    tokenizer = byte_level()
    places_of, encoding = token_bytes(tokenizer), tokenizer.encode("the answer")
    assert places_of is not None and encoding.tokens[0] == "the"
    assert places_of.first_tokens("the answer", array("I", encoding.ids), [3]) == [1]
    assert places_of.first_tokens("the answer", array("I", encoding.ids), [2]) is None
    with pytest.raises(RecordError, match="a token on both sides"):
        _first_token(encoding, "the answer", (), 2)


def test_tokens_that_take_up_the_same_blanks_have_no_places():
    """The library's quirk: both tokens have the line breaks in their offsets."""
    tokenizer, text = byte_level(), "<|taking|>\n\n"
    places_of, encoding = token_bytes(tokenizer), tokenizer.encode(text)
    assert places_of is not None and encoding.tokens == ["<|taking|>", "\n\n"]
    assert places_of.first_tokens(text, array("I", encoding.ids), [10]) is None
