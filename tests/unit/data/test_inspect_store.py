"""Windows of a store as `nemo distill inspect` shows them."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from distill_nemo.data.inspect import inspect_documents
from distill_nemo.data.inspect_store import SHOWN_IDS, inspect_windows
from distill_nemo.data.token_files import write_index
from distill_nemo.teacher_store.writer import finish_store
from tests.stores import L, manifest_of, random_window, write_windows

WORDS = ["<e>", *(f"w{i}" for i in range(1, 63)), "\x9b!"]


def shown(path, samples=1):
    console = Console(file=io.StringIO(), width=100, color_system=None)
    inspect_windows(str(path), samples, None, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a tokenizer of 64 words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<e>"))
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(path)
    return path


@pytest.mark.parametrize("codec", ["sampled", "top_k", "hidden"])
def test_the_text_of_taught_tokens_is_marked_and_their_targets_are_listed(codec, tokenizer, tmp_path):
    manifest = manifest_of(codec, vocab_size=64, num_windows=3, tokenizer=str(tokenizer))
    windows = [random_window(manifest, number) for number in range(3)]
    windows[0]["tokens"][3] = windows[0]["top1"][0] = 63  # moves a terminal's cursor
    write_windows(tmp_path / "store", manifest, windows)
    assert finish_store(tmp_path / "store")
    page, window = shown(tmp_path / "store"), windows[0]
    places = np.flatnonzero(window["loss_mask"])
    assert f"window 1 of 3: {L} tokens, {len(places)} with targets" in page and "\x9b" not in page
    assert page.count("⟦") == 1 + np.count_nonzero(np.diff(places) > 1)
    _, *rows = [line for line in page.splitlines() if line[:8].strip().isdigit() or line.startswith("position")]
    assert len(rows) == min(len(places), 12)
    row, first = rows[0], places[0]
    word = WORDS[window["tokens"][first + 1]].replace("\x9b", "\ufffd")
    numbers = [f'"{word}"', f"{window['label_logprob'][0]:.3f}", f"{window['entropy'][0]:.3f}"]
    assert row.split()[:4] == [str(first + 1), *numbers]
    if codec == "hidden":
        assert row.endswith('"\ufffd!"')
        return
    ids = window["ids"][0]
    weights = window["counts" if codec == "sampled" else "logprobs"][0]
    best = max((i for i in range(len(ids)) if ids[i] >= 0), key=lambda i: weights[i])
    share = f"{weights[best]}/12" if codec == "sampled" else f"{math.exp(weights[best]):.1%}"
    assert f'  "{WORDS[ids[best]]}" {share}'.replace("\x9b", "\ufffd") in row
    more = (ids >= 0).sum() - SHOWN_IDS
    assert (f", {more} more" in row) == (more > 0)
    if codec == "top_k":
        assert row.endswith(f"all others {math.exp(window['tail'][0]):.1%}")


def test_windows_are_spread_over_the_store(tokenizer, tmp_path):
    manifest = manifest_of(vocab_size=64, num_windows=9, tokenizer=str(tokenizer))
    write_windows(tmp_path / "store", manifest, [random_window(manifest, number) for number in range(9)])
    with pytest.raises(ValueError, match=r"store is not complete; run the command that wrote it again"):
        shown(tmp_path / "store")
    assert finish_store(tmp_path / "store")
    page = shown(tmp_path / "store", 3)
    assert [f"window {number} of 9" in page for number in range(1, 10)] == [
        number in (1, 5, 9) for number in range(1, 10)
    ]


def test_a_wrong_path_is_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"^data: .*x is neither a teacher store \(no file .*x/manifest\.json\) nor the"
    ):
        inspect_documents(str(tmp_path / "x"), 1, None, Console())


@pytest.mark.parametrize(
    ("dtype", "strange"), [("uint16", 60_000), ("int32", -1), ("int32", 2**31 - 1), ("int64", 2**40), ("int8", -3)]
)
def test_an_id_that_is_no_token_of_the_tokenizer_is_named(tokenizer, tmp_path, dtype, strange):
    np.array([5, 6, 7, strange, 5], dtype).tofile(tmp_path / "x.bin")
    write_index(tmp_path / "x.idx", np.array([2, 3], np.int32), dtype)
    with pytest.raises(ValueError, match=rf"x\.bin: document 2 has the id {strange}, which is no token"):
        inspect_documents(str(tmp_path / "x"), 2, str(tokenizer), Console(file=io.StringIO()))
