"""The manifest of a store that a config describes: everything that decides its bytes."""

import hashlib
import json
from collections import ChainMap
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

from distill_nemo.checkpoint.identity import NamedFiles, content_hashes, corpus_files, weight_files
from distill_nemo.config import StoreConfig, TeacherConfig
from distill_nemo.data.corpora import corpus_at
from distill_nemo.data.datasets import samples_of_a_pass
from distill_nemo.data.manifest import max_token_id, pack_vocabulary, read_manifest, vocabulary
from distill_nemo.data.token_files import documents_apart, named_corpora
from distill_nemo.data.tokenizer import load_tokenizer
from distill_nemo.fields import require
from distill_nemo.hub import recorded_name
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.export_files import tokenizer_files
from distill_nemo.teacher_store.manifest import SHARD_BYTES, Manifest
from distill_nemo.teacher_store.shards import shared_row_bytes

SHARD_TOKENS = 2**18  # at least: some 20 MB of draws, and seconds of a teacher
NUM_SHARDS = 4096  # aimed at beyond 10**9 tokens, until shards have `SHARD_BYTES`
PACKAGES = ("distill-nemo", "torch", "megatron-core", "transformers", "numpy")


def sized_manifest(config: StoreConfig, model: Architecture, dtype: torch.dtype) -> Manifest:
    """Return the manifest without hashes and vocabularies. Reads token files only if `windows` is not set.

    Raises:
        ValueError: if the data has no whole window, or the teacher has fewer ids than `top_k`.
    """
    require(
        config.codec != "top_k" or config.top_k <= model.vocab_size,
        f"top_k = {config.top_k} is more than teacher.vocab_size = {model.vocab_size}; set it to at most that",
    )
    nums = {"sampled": config.draws, "top_k": config.top_k, "hidden": model.hidden_size}
    manifest = Manifest(
        codec=config.codec,
        num=nums[config.codec],
        temperature=config.temperature,
        vocab_size=model.vocab_size,
        sequence_length=config.data.sequence_length,
        num_windows=config.windows or samples_of_a_pass(config.data),
        windows_per_shard=1,
        seed=config.seed,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        documents_apart=documents_apart(config.data),
        loss_on=config.data.loss_on,
        logit_scale=model.multipliers.logits,
        logit_softcap=model.multipliers.softcap,
    )
    return replace(manifest, windows_per_shard=config.shard_windows or windows_per_shard(manifest))


def manifest_of(config: StoreConfig, model: Architecture, dtype: torch.dtype) -> Manifest:
    """Return the manifest. Hashes weights and token files; every rank must call it.

    Raises:
        ValueError: if a file cannot be read, or the data has no whole window.
    """
    data = config.data
    files, sums = identifying_files(config)
    hashes = content_hashes(files, Path(config.output), sums)
    prepared = [read_manifest(prefix) for _, prefix in named_corpora(data)]
    occurring = [vocabulary(each) for each in prepared]
    largest = [max_token_id(each) for each in prepared]
    tokenizer, tokens = _tokenizer(config)
    return replace(
        sized_manifest(config, model, dtype),
        teacher={"weights": hashes["weights"], "architecture": architecture_hash(model)},
        sources={"train": hashes["train"], "split": data.split},
        checkpoint=recorded_name(config.teacher.checkpoint) if config.teacher.checkpoint else None,
        tokenizer=recorded_name(tokenizer) if tokenizer else None,
        teacher_vocabulary=pack_vocabulary(tokens) if tokens else None,
        vocabulary=_joined(occurring),
        max_token_id=None if None in largest else max(each for each in largest if each is not None),
        versions={name: version(name) for name in PACKAGES},
    )


def identifying_files(config: StoreConfig) -> tuple[dict[str, NamedFiles], dict[Path, str]]:
    """Return the files of teacher and data, and the sums of further files, as `content_hashes` takes them."""
    sums = [corpus_at(path).sums for _, path in named_corpora(config.data)]
    files = {"weights": weight_files(config.teacher.checkpoint), "train": corpus_files(config.data.train)}
    return files, dict(ChainMap(*sums))


def architecture_hash(model: Architecture) -> str:
    """Return a hash of every resolved field of a model, wherever its checkpoint lies."""
    fields = asdict(model.filled(TeacherConfig())) | {"checkpoint": None}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def windows_per_shard(manifest: Manifest) -> int:
    """Return as many windows as keep both small: the number of files, and what an interruption costs each writer.

    10**11 tokens are 25,000 shards of 68 bytes a token, each minutes of a teacher.
    """
    token_bytes = shared_row_bytes(manifest, "tokens") + manifest.coding.usual_bytes
    window_bytes = shared_row_bytes(manifest, "windows") + token_bytes * manifest.sequence_length
    tokens = max(SHARD_TOKENS, manifest.num_windows * manifest.sequence_length // NUM_SHARDS)
    return max(min(tokens // manifest.sequence_length, int(SHARD_BYTES / window_bytes)), 1)


def _tokenizer(config: StoreConfig) -> tuple[str | None, dict[int, str] | None]:
    """Return the tokenizer that the config names, else the teacher's own, and its tokens by id."""
    checkpoint = config.teacher.checkpoint
    own = checkpoint if checkpoint and tokenizer_files(Path(checkpoint)) else None
    path = config.data.tokenizer or own
    if path is None:
        return None, None
    return path, {i: token for token, i in sorted(load_tokenizer(path).vocab.items(), key=lambda item: item[1])}


def _joined(occurring: list[dict[int, str] | None]) -> str | None:
    """Return the tokens that occur in any of the token files; None if some file does not say."""
    known = [tokens for tokens in occurring if tokens is not None]
    joined = {i: token for each in known for i, token in each.items()}
    return pack_vocabulary(dict(sorted(joined.items()))) if len(known) == len(occurring) else None
