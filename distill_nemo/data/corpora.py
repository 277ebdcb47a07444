"""Corpora that `data.train` and `data.valid` name: token files, or stores of a teacher's targets. No torch."""

import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from distill_nemo.config import DataConfig
from distill_nemo.data.manifest import pack_length, read_manifest
from distill_nemo.data.token_files import check_files, document_lengths, index_layout, named_corpora
from distill_nemo.fields import require
from distill_nemo.teacher_store.manifest import MANIFEST, is_store
from distill_nemo.teacher_store.reader import TeacherStore


class Corpus(ABC):
    """One corpus, as far as it is asked before a run opens it.

    Args:
        path: prefix of token files, or directory of a store.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    @abstractmethod
    def files(self) -> dict[str, Path]:
        """Files that hold its content, by what distinguishes them; empty if there are none."""

    @property
    def sums(self) -> dict[Path, str]:
        """Further files, with the SHA-256 that each must have."""
        return {}

    @property
    def note(self) -> str:
        """Anything else that a plan says of it."""
        return ""

    @property
    @abstractmethod
    def valid_share(self) -> float | None:
        """Share of tokens that count in the losses; None if it does not say."""

    @abstractmethod
    def pass_tokens(self) -> int:
        """Return the tokens of one pass."""

    @abstractmethod
    def check(self, field: str, data: DataConfig) -> None:
        """Refuse files that are missing, damaged or cut for other samples.

        Raises:
            ValueError: naming the field, the file, what it holds, and what to do.
        """


class TokenFiles(Corpus):
    """Token files, made by `nemo distill prepare`."""

    @property
    def files(self) -> dict[str, Path]:
        """Index, tokens and mask. A run without the manifest of packs would read other samples."""
        length = pack_length(self.path)
        packs = "" if length is None else f", packs of {length}"
        named = {suffix: Path(f"{self.path}{suffix}") for suffix in (".idx", ".bin", ".mask")}
        return {suffix + packs: path for suffix, path in named.items() if path.is_file()}

    @property
    def valid_share(self) -> float | None:
        """Share by the manifest. Padding does not count."""
        counted = read_manifest(self.path).get("counted_tokens")
        return counted / max(self.pass_tokens(), 1) if type(counted) is int else None

    def pass_tokens(self) -> int:
        """Return all tokens, with the padding of packs."""
        length = pack_length(self.path)
        if length is not None:
            return index_layout(self.path).groups * length
        return int(document_lengths(self.path).sum(dtype=np.int64))

    def check(self, field: str, data: DataConfig) -> None:
        """Compare sizes, index, packs and mask."""
        check_files(field, self.path, data)


class StoreCorpus(Corpus):
    """A teacher store, made by `nemo distill teacher`."""

    @property
    def files(self) -> dict[str, Path]:
        """The manifest, which has the hash of every other file."""
        return {MANIFEST: Path(self.path, MANIFEST)}

    @property
    def sums(self) -> dict[Path, str]:
        """Shards, and the teacher's output layer."""
        return TeacherStore(self.path).sums

    @property
    def note(self) -> str:
        """Codec and bytes."""
        store = TeacherStore(self.path)
        size = sum(path.stat().st_size for path in store.sums)
        each = size / max(store.num_tokens, 1)
        return f"{store.manifest.codec} targets, {size / 1e9:,.2f} GB, {each:,.1f} bytes a token that counts"

    @property
    def valid_share(self) -> float:
        """Share of the windows."""
        return TeacherStore(self.path).num_tokens / self.pass_tokens()

    def pass_tokens(self) -> int:
        """Return the tokens of all windows."""
        manifest = TeacherStore(self.path).manifest
        return manifest.num_windows * manifest.sequence_length

    def check(self, field: str, data: DataConfig) -> None:
        """Compare the sizes of all files with the manifest, and the manifest with `data`."""
        try:
            store = TeacherStore(self.path)
            store.check()
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        manifest = store.manifest
        wanted = {"sequence_length": manifest.sequence_length, "loss_on": manifest.loss_on}
        wanted |= {} if manifest.documents_apart else {"reset_at_documents": False}
        apart = {name: value for name, value in wanted.items() if getattr(data, name) != value}
        require(
            not apart,
            f"{field}: the store {self.path} holds other samples than the run asks for; {fitting('data', apart)} would "
            "fit, or another store written by `nemo distill teacher`",
        )


def corpus_at(path: str | Path) -> Corpus:
    """Return what lies at a path; token files if nothing does."""
    return StoreCorpus(str(path)) if is_store(path) else TokenFiles(str(path))


def check_corpora(data: DataConfig) -> None:
    """Check every corpus that a config names.

    Raises:
        ValueError: from `Corpus.check` and `check_once`.
    """
    blends: dict[str, list[Corpus]] = {}
    for field, path in named_corpora(data):
        corpus = corpus_at(path)
        corpus.check(field, data)
        blends.setdefault(field, []).append(corpus)
    for field, corpora in blends.items():
        check_once(field, corpora)


def check_once(field: str, corpora: list[Corpus]) -> None:
    """Refuse a blend that names a corpus twice. Both parts would have the same samples in the same order.

    Args:
        field: of the blend.
        corpora: whose files are there.

    Raises:
        ValueError: naming the corpus by both names.
    """
    known: dict[frozenset[str], str] = {}
    for corpus in corpora:
        files = _places(corpus)
        if files in known:
            first = known[files]
            also = "" if first == corpus.path else f", also as {corpus.path}"
            raise ValueError(
                f"{field} names {first} twice{also}: batches would hold the same samples twice; name it once, with the "
                "sum of its weights"
            )
        known[files] = corpus.path


def trained_on(data: DataConfig) -> list[str]:
    """Return the corpora of `data.valid` that are in `data.train`, too, so that losses on them are not held out."""
    places = [(field, path, _places(corpus_at(path))) for field, path in named_corpora(data)]
    trained = [files for field, _, files in places if field == "data.train"]
    return [path for field, path, files in places if field == "data.valid" and files in trained]


def _places(corpus: Corpus) -> frozenset[str]:
    return frozenset(os.path.realpath(path) for path in corpus.files.values())


def fitting(section: str, values: dict[str, object]) -> str:
    """Return fields of a config with the values that would fit."""
    return " ".join(f"{section}.{name}={value}" for name, value in values.items())
