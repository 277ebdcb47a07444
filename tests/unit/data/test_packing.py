"""`prepare` with `pack`: documents are put together whole, and nothing depends on workers or interruptions."""

import io
import json
import os
import re
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from rich.console import Console

import distill_nemo.data.prepare as module
from distill_nemo.config import DataConfig
from distill_nemo.data.corpora import check_corpora
from distill_nemo.data.inspect import inspect_documents
from distill_nemo.data.packing import best_fit
from distill_nemo.data.prepare import prepare
from distill_nemo.data.token_masks import TokenMask
from tests.unit.data.chat_templates import CHATML, write_tokenizer

LENGTHS = {  # realistic distributions of tokens, and the length of packs
    "chats": (np.random.default_rng(0).lognormal(np.log(400), 1.0, 3000), 4096),
    "instructions": (np.random.default_rng(1).lognormal(np.log(90), 0.6, 5000), 2048),
    "web": (np.random.default_rng(2).lognormal(np.log(600), 1.2, 3000), 8192),
    "reasoning": (np.random.default_rng(3).lognormal(np.log(5000), 0.7, 2000), 32768),
}
TEXTS = [f"{'word ' * (7 * i % 40)}number {i}" for i in range(60)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {text}"}, {"role": "assistant", "content": text}]} for text in TEXTS
]


def made(tmp_path: Path, name: str, records: list[dict], **options) -> str:
    source, tokenizer = tmp_path / "in.jsonl", tmp_path / "tokenizer"
    if not source.exists():
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        write_tokenizer(tokenizer, CHATML)
    prepare([str(source)], str(tmp_path / name), str(tokenizer), **{"num_workers": 1, "progress": False} | options)
    return str(tmp_path / name)


def documents(prefix: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return ids and mask of every document."""
    found, first = [], 0
    mask = TokenMask(prefix) if Path(f"{prefix}.mask").exists() else None
    for ids in IndexedDataset(prefix):
        counts = [1] * len(ids) if mask is None else mask.of_document(first, len(ids)).tolist()
        found.append((tuple(ids.tolist()), tuple(counts)))
        first += len(ids)
    return found


def manifest(prefix: str) -> dict:
    return json.loads(Path(f"{prefix}.json").read_text())


@pytest.mark.parametrize("name", LENGTHS)
def test_packs_of_realistic_lengths_are_full_and_hold_each_document_once(name: str):
    drawn, length = LENGTHS[name]
    lengths = [size for size in map(int, drawn) if 0 < size <= length + 1]
    packs = best_fit(lengths, length + 1)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert max(sum(lengths[number] for number in pack) for pack in packs) <= length + 1
    assert sum(lengths) / len(packs) / (length + 1) >= 0.97


def test_the_longest_comes_first_into_the_fullest_pack_that_takes_it():
    assert best_fit([5, 3, 9, 4, 2, 10, 1], 10) == [[5], [2, 6], [0, 3], [1, 4]]
    assert best_fit([], 10) == [] and best_fit([7, 7], 10) == [[0], [1]]


def test_the_last_answer_is_not_read_from_pieces_of_a_conversation(tmp_path: Path):
    turns = [{"role": role, "content": "word " * 9} for role in ("user", "assistant") * 3]
    for loss_on in (None, "last"):
        prefix = made(tmp_path, f"cut_{loss_on}", [{"messages": turns}], pack=64, too_long="cut", loss_on=loss_on)
        data = DataConfig(train=[prefix], sequence_length=64, loss_on="last")
        if loss_on == "last":
            check_corpora(data)
        else:
            with pytest.raises(ValueError, match=r"does not show where the last answer .* prepare with loss_on=last"):
                check_corpora(data)


@pytest.mark.parametrize("chats", [False, True])
def test_packs_hold_the_documents_with_their_masks_whatever_makes_them(tmp_path: Path, monkeypatch, chats: bool):
    records = CHATS if chats else [{"text": text} for text in TEXTS]
    plain, packed = made(tmp_path, "plain", records), made(tmp_path, "packed", records, pack=600)
    assert Counter(documents(packed)) == Counter(documents(plain)) and documents(packed) != documents(plain)
    index = IndexedDataset(packed)
    sizes = np.add.reduceat(index.sequence_lengths, index.document_indices[:-1])
    facts = manifest(packed)
    assert sizes.max() <= 601 and len(sizes) == facts["packs"] < len(TEXTS) / 2
    assert facts["fill"] == round(facts["tokens"] / (601 * facts["packs"]), 4) and facts["pack"] == 600
    wanted = {name: manifest(plain)[name] for name in module.COUNTS}
    wanted["counted_tokens"] -= 0 if chats else wanted["documents"]  # their first tokens, which nothing predicts
    assert {name: facts[name] for name in module.COUNTS} == wanted
    monkeypatch.setattr(module, "MIN_PART_BYTES", 3000)
    other = made(tmp_path, "other", records, pack=600, num_workers=2)
    suffixes = (".bin", ".idx", *([".mask"] if chats else []))
    assert all(Path(packed + suffix).read_bytes() == Path(other + suffix).read_bytes() for suffix in suffixes)


def test_a_window_of_many_parts_needs_few_open_files(tmp_path: Path, monkeypatch):
    plain = made(tmp_path, "plain", CHATS)
    monkeypatch.setattr(module, "MIN_PART_BYTES", 100)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 90, limits[1]))
    try:
        prefix = made(tmp_path, "packs", CHATS, pack=600)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert Counter(documents(prefix)) == Counter(documents(plain))


def test_packs_are_made_again_for_another_length_only(tmp_path: Path, capsys):
    records = [{"text": text} for text in TEXTS]
    prefix = made(tmp_path, "a", records, pack=600)
    before = capsys.readouterr().out
    assert re.search(r"^\d+ packs of 600 tokens, \d\d\.\d% full$", before, re.M)
    made(tmp_path, "a", records, pack=600)
    assert "nothing to do" in capsys.readouterr().out
    made(tmp_path, "a", records, pack=700)
    assert "nothing to do" not in capsys.readouterr().out and manifest(prefix)["pack"] == 700
    made(tmp_path, "a", records)
    assert "pack" not in manifest(prefix) and len(IndexedDataset(prefix).document_indices) == len(TEXTS) + 1


def test_what_an_interrupted_run_left_is_told_whatever_packs_leave_out(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(module, "MIN_PART_BYTES", 3000)
    with pytest.raises(ValueError, match="no document is at most 9 tokens"):
        made(tmp_path, "packs", CHATS, pack=8)
    parts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("packs.parts/0*.json"))]
    (tmp_path / "packs.parts" / "000001.json").unlink()
    made(tmp_path, "packs", CHATS, pack=100)
    left = sum(part["tokens"] for part in parts) - parts[1]["tokens"]
    assert f" ({left:,} from an earlier, interrupted run), " in capsys.readouterr().out


def test_long_documents_are_cut_or_dropped_as_told_and_counted(tmp_path: Path, capsys):
    records = [{"text": text} for text in TEXTS]
    plain = documents(made(tmp_path, "plain", records))
    long = [ids for ids, _ in plain if len(ids) > 101]
    assert 'format: text (whole files, or the key "text")\n' in capsys.readouterr().out
    cut = made(tmp_path, "cut", records, pack=100)
    pieces = sum(-(-len(ids) // 101) for ids in long)
    assert f"; {len(long)} longer documents cut into {pieces} pieces\n" in capsys.readouterr().out
    assert manifest(cut)["tokens"] == sum(len(ids) for ids, _ in plain)
    assert Counter(documents(cut)) == Counter(
        (ids[i : i + 101], counts[i : i + 101]) for ids, counts in plain for i in range(0, len(ids), 101)
    )
    assert manifest(cut)["counted_tokens"] == manifest(cut)["tokens"] - len(documents(cut)), "firsts are predicted"
    dropped = made(tmp_path, "dropped", records, pack=100, too_long="drop")
    assert f"; {len(long)} longer documents left out ({sum(map(len, long)):,} tokens)\n" in capsys.readouterr().out
    assert Counter(documents(dropped)) == Counter(document for document in plain if len(document[0]) <= 101)
    (tmp_path / "in.jsonl").unlink()
    chats = made(tmp_path, "chats", CHATS, pack=100)
    assert manifest(chats)["too_long"] == "drop" and manifest(chats)["too_long_documents"] > 0
    counted = sum(sum(counts[1:]) for _, counts in documents(chats))
    assert manifest(chats)["counted_tokens"] == counted > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack": 1}, r"pack must be at least 2 tokens, got 1"),
        ({"pack": -5}, r"pack must be at least 2 tokens, got -5"),
        ({"too_long": "cut"}, r"too_long = cut is for packs: set pack"),
        ({"pack": 2, "too_long": "drop"}, r"at most 3 tokens long .*, the shortest has \d+: set a larger pack, or"),
    ],
)
def test_packs_that_cannot_be_made_are_refused(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, "a", [{"text": "a document of some words"}], **options)
    assert not list(tmp_path.glob("a.bin"))


def test_inspect_shows_where_packs_and_their_documents_begin(tmp_path: Path):
    prefix = made(tmp_path, "a", CHATS, pack=300)
    console = Console(file=io.StringIO(), width=100)
    inspect_documents(prefix, 2, None, console)
    lines = console.file.getvalue().splitlines()
    index, facts = IndexedDataset(prefix), manifest(prefix)
    bounds = index.document_indices
    for number in (0, facts["packs"] - 1):
        inside = index.sequence_lengths[bounds[number] : bounds[number + 1]]
        title = f" pack {number + 1} of {facts['packs']}: {len(inside)} documents, {inside.sum()} of 301 tokens "
        assert [line.strip("═") for line in lines if line.startswith("═")].count(title) == 1
    shown = [*range(bounds[1]), *range(bounds[-2], bounds[-1])]
    assert [line for line in lines if "─" in line] == [
        line for line in lines for number in shown if f" document {number + 1} of {facts['documents']}: " in line
    ]
    assert sum("⟦" in line for line in lines) == len(shown)
