"""The manifest of a store: its teacher, its numbers, and the hash of every shard once the store is complete."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from distill_nemo.config_files import from_dict
from distill_nemo.fields import require
from distill_nemo.runtime.files import read_object
from distill_nemo.teacher_store.codecs.codec import Codec, DtypeName, Field
from distill_nemo.teacher_store.codecs.known import CODECS, CodecName

MANIFEST = "manifest.json"
OUTPUT_LAYER = "output_layer.safetensors"
SHARD_BYTES = 2**28  # aimed at; a job that is interrupted repeats at most one shard of each writer
FORMAT = 1
NO_MATTER = ("checkpoint", "tokenizer", "versions")  # of a manifest
LARGEST = {
    "num": 2**20,
    "vocab_size": 2**24,
    "sequence_length": 2**31,
    "num_windows": 2**40,
    "windows_per_shard": 2**32,
}


@dataclass(frozen=True)
class ShardFacts:
    """One shard: its hash, and how many tokens count and how many pairs of its codec it holds."""

    sha256: str
    tokens: int
    pairs: int = 0


class Contents(NamedTuple):
    """Files of a complete store."""

    shards: list[ShardFacts]
    output_layer: str | None  # SHA-256, of `hidden` only


@dataclass(frozen=True)
class Manifest:
    """Everything about a store but its windows. Two jobs write on one store only if all but `NO_MATTER` is equal.

    Args:
        codec: `sampled`, `top_k` or `hidden`.
        num: draws, ids or channels of a token.
        temperature: of the draws, or of the log-probabilities.
        vocab_size: of the teacher, without padding.
        sequence_length: of a window, which has one token more.
        num_windows: of the store.
        windows_per_shard: of every shard but the last.
        seed: of the draws.
        dtype: of the teacher's run.
        documents_apart: windows say where documents begin; attention and positions stay inside them.
        loss_on: of the job that wrote the store, see `DataConfig`.
        teacher: digests of weights and config.
        sources: digests of the data.
        checkpoint: directory of the teacher, when the store was written.
        tokenizer: directory, for messages.
        teacher_vocabulary: tokens of the teacher's tokenizer, by `data.manifest.pack_vocabulary`.
        vocabulary: the same of the tokens that occur, as the manifests of the sources give them.
        max_token_id: the largest id that occurs.
        logit_scale: factor of the teacher's logits, for `hidden`.
        logit_softcap: cap of the teacher's logits, for `hidden`.
        output_bias: the teacher's output layer has a bias, for `hidden`.
        versions: of the packages that wrote it.
        format: of the files.
    """

    codec: CodecName
    num: int
    temperature: float
    vocab_size: int
    sequence_length: int
    num_windows: int
    windows_per_shard: int
    seed: int
    dtype: DtypeName
    documents_apart: bool = False
    loss_on: str | None = None
    teacher: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    tokenizer: str | None = None
    teacher_vocabulary: str | None = None
    vocabulary: str | None = None
    max_token_id: int | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    output_bias: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-self.num_windows // self.windows_per_shard)

    @property
    def coding(self) -> Codec:
        """The codec, with the store's numbers."""
        return CODECS[self.codec](self.num, self.vocab_size, self.dtype)

    @property
    def fields(self) -> dict[str, Field]:
        """Arrays of a batch that a run trains from."""
        names = ["entropy", "label_logprob", *(["entropy_at_1"] if self.temperature != 1 else [])]
        numbers = {name: Field("float32", ()) for name in names} | {"top1": Field("int32", ())}
        return {"has_targets": Field("uint8", ())} | numbers | self.coding.fields

    def windows_of(self, shard: int) -> range:
        """Return the numbers of a shard's windows."""
        first = shard * self.windows_per_shard
        return range(first, min(first + self.windows_per_shard, self.num_windows))

    @property
    def largest_shard(self) -> int:
        """Number of windows of the first shard; none has more."""
        return len(self.windows_of(0))


def shard_name(shard: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{shard:06d}.safetensors"


def is_store(path: str | Path) -> bool:
    """Return True if a path is a store, complete or not."""
    return Path(path, MANIFEST).is_file()


def read_store_manifest(store: Path) -> tuple[Manifest, Contents | None]:
    """Return the manifest of a store, and its files; None if it is not complete.

    Raises:
        ValueError: if it is missing or damaged, or of another version of the format.
    """
    path = store / MANIFEST
    values = read_object(path)
    require(
        values.get("format") == FORMAT,
        f"{path} has the format {values.get('format')!r}, and {FORMAT} is read: write the store again with this "
        f"version, or read it with the one that wrote it ({values.get('versions')})",
    )
    shards, output_layer = values.pop("shards", None), values.pop("output_layer", None)
    try:
        manifest = from_dict(values, Manifest, "manifest.")
        _check(manifest)
        if shards is None:
            return manifest, None
        require(isinstance(shards, list), "shards is not a list")
        facts = [from_dict(each, ShardFacts, f"shards[{i}].") for i, each in enumerate(shards)]
        require(len(facts) == manifest.num_shards, f"it lists {len(facts)} shards, needs {manifest.num_shards}")
        require(isinstance(output_layer, str) == (manifest.codec == "hidden"), "output_layer does not fit its codec")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return manifest, Contents(facts, output_layer)


def manifest_text(manifest: Manifest, contents: Contents | None = None) -> str:
    """Return the content of a manifest's file."""
    values = asdict(manifest)
    if contents is not None:
        values |= {"shards": [asdict(shard) for shard in contents.shards], "output_layer": contents.output_layer}
    return json.dumps(values, indent=1)


def differences(ours: Manifest, theirs: Manifest) -> list[str]:
    """Name the fields in which two jobs differ that want to write on one store."""
    names = [each.name for each in fields(Manifest) if each.name not in NO_MATTER]
    apart = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    long = ("vocabulary", "teacher_vocabulary")
    return [
        name if name in long else f"{name}: was {getattr(theirs, name)!r}, is {getattr(ours, name)!r}" for name in apart
    ]


def _check(manifest: Manifest) -> None:
    for name, most in LARGEST.items():
        value = getattr(manifest, name)
        require(1 <= value <= most, f"{name} = {value} is not from 1 to {most}")
    require(manifest.temperature > 0, f"temperature = {manifest.temperature} is not above 0")
    require(
        manifest.codec != "top_k" or manifest.num <= manifest.vocab_size,
        f"num = {manifest.num} is more than vocab_size = {manifest.vocab_size}",
    )
