"""The datasets of a run, with the samples that its steps need, and the checks before them."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from distill_nemo.config import DataConfig, RunConfig
from distill_nemo.data.corpora import check_corpora, trained_on
from distill_nemo.data.datasets import build_datasets, check_micro_batch, check_number_of_samples
from distill_nemo.data.manifest import name_of, read_manifest, vocabulary
from distill_nemo.data.token_files import OWN_TOKENIZER, check_vocabulary, named_corpora
from distill_nemo.data.tokenizer import Tokenizer, load_tokenizer
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.export_files import tokenizer_files
from distill_nemo.training.stores import check_stores, target_fields

MAX_RENAMED = 0.01  # share of ids that may name other tokens, since fine-tuned models rename reserved ones


def check_run_data(config: RunConfig, student: Architecture) -> None:
    """Refuse token files and tokenizers that do not fit the student, and warn of held-out data that is trained on.

    Every file of every store is looked at, so one rank calls it for all.

    Raises:
        ValueError: for files that are missing, empty, truncated, or of a larger vocabulary than the model's; for more
            samples than memory holds; and from `check_stores` and `check_tokenizers`.
    """
    check_corpora(config.data)
    train = config.training
    for name in ("steps", "eval_batches"):
        count = getattr(train, name)
        stated = f"training.{name} = {count} of training.global_batch_size = {train.global_batch_size}"
        check_number_of_samples(stated, count * train.global_batch_size)
    check_micro_batch("training.micro_batch_size", train.micro_batch_size, config.data.sequence_length)
    check_vocabulary(config.data, student.vocab_size)
    check_stores(config, student.vocab_size)
    check_tokenizers(config.data, checkpoints_of(config), student)
    for path in trained_on(config.data):
        print(f"warning: data.valid: {path} is a part of data.train, too: its losses are not held out", file=sys.stderr)


def checkpoints_of(config: RunConfig) -> dict[str, str | None]:
    """Return the checkpoints of a run's models by role."""
    return {"student": config.student.checkpoint, "teacher": config.teacher.checkpoint if config.teacher else None}


def check_tokenizers(data: DataConfig, checkpoints: dict[str, str | None], model: Architecture) -> None:
    """Compare the tokenizers that the data names, or that lie beside the models, id by id.

    Vocabularies of equal size may still differ. A loss between them would fall without meaning anything.

    Args:
        data: token files and their tokenizer.
        checkpoints: of the models, by role.
        model: architecture of the first of them.

    Raises:
        ValueError: with the first id that names different tokens, in two tokenizers or in a tokenizer and the token
            files; for a `data.tokenizer` with more ids than the model, added tokens aside; for a `vocab_size` that
            cuts off tokens of the model, which its export would still have.
    """
    named = {"data.tokenizer": data.tokenizer, **{f"{role}.checkpoint": path for role, path in checkpoints.items()}}
    known: dict[str, tuple[str, Tokenizer]] = {}  # by path: the field that names it
    for field, path in named.items():
        asked_for = field == "data.tokenizer"
        if path and path not in known and (asked_for or tokenizer_files(Path(path))):
            # A tokenizer that the user did not name and that cannot be loaded is not compared.
            with contextlib.nullcontext() if asked_for else contextlib.suppress(ValueError):
                known[path] = field, load_tokenizer(path)
    for field, tokenizer in known.values():
        _check_size(field, tokenizer, next(iter(checkpoints)), model)
    named_tokens = [
        (f"{field} = {path}", {i: token for token, i in tokenizer.vocab.items()})
        for path, (field, tokenizer) in known.items()
    ]
    named_tokens += _tokens_of_stored_teachers(data)
    for other, theirs in named_tokens[1:]:
        first, ours = named_tokens[0]
        shared = sorted(ours.keys() & theirs.keys())
        apart = [i for i in shared if ours[i] != theirs[i]]
        if len(apart) > MAX_RENAMED * len(shared):
            i = apart[0]
            raise ValueError(
                f"{first} and {other} have different tokenizers: of {len(shared):,} ids {len(apart):,} are other "
                f"tokens, such as {i}: {ours[i]!r} and {theirs[i]!r}; logits can be compared only if both models have "
                "the same tokens"
            )
    own = next(iter(known.values()))[1].vocabulary_sha256 if known else None
    _check_corpora(data, own, *(named_tokens[0] if named_tokens else ("", {})))


def _tokens_of_stored_teachers(data: DataConfig) -> list[tuple[str, dict[int, str]]]:
    """Return the name and the tokens by id of the teacher of each store, if the store has them."""
    named = [(f"{field} = {path} (its teacher)", read_manifest(path)) for field, path in named_corpora(data)]
    found = [(name, vocabulary(manifest, "teacher_vocabulary")) for name, manifest in named]
    return [(name, tokens) for name, tokens in found if tokens]


def _check_corpora(data: DataConfig, own: str | None, tokenizer: str, tokens: dict[int, str]) -> None:
    """Refuse token files in which an id is another token than in the tokenizer or, without one, in the other files.

    Only ids that occur, by the manifests, are compared, so tokens may be added to a tokenizer later. Hundreds of files
    of the same tokenizer need not be compared. `own` is the hash of the tokenizer's vocabulary.
    """
    named = [(field, prefix, read_manifest(prefix)) for field, prefix in named_corpora(data)]
    hashes = [manifest.get("vocabulary_sha256") for _, _, manifest in named] + ([own] if tokens else [])
    if isinstance(hashes[0], str) and all(found == hashes[0] for found in hashes):
        return
    known = dict(tokens)
    for field, prefix, manifest in named:
        made_with = vocabulary(manifest) or {}
        apart = [i for i, token in made_with.items() if known.get(i, None if tokens else token) != token]
        if apart:
            i = apart[0]
            raise ValueError(
                f"{field}: {name_of(prefix)} was made with another tokenizer ({manifest.get('tokenizer')}) than "
                f"{tokenizer or 'the other token files'}: of {len(made_with):,} ids that occur {len(apart):,} are "
                f"other tokens, such as {i}: {made_with[i]!r} and {known.get(i)!r}; {OWN_TOKENIZER}"
            )
        known |= made_with


def _check_size(field: str, tokenizer: Tokenizer, role: str, model: Architecture) -> None:
    """Refuse a tokenizer with more ids than the model has rows.

    Tokens added to a `data.tokenizer`, such as a [PAD], may lie beyond the rows, since `check_vocabulary` and the
    datasets check the ids that occur.
    """
    vocab_size = model.vocab_size
    left_out = tokenizer.added if field == "data.tokenizer" else set()
    num_ids = 1 + max((i for token, i in tokenizer.vocab.items() if token not in left_out), default=-1)
    if num_ids <= vocab_size:
        return
    if field == "data.tokenizer":
        raise ValueError(
            f"data.tokenizer = {tokenizer.path} has {num_ids} ids, but {role}.vocab_size = {vocab_size}: name the "
            f"{role}'s own tokenizer, and prepare the text with it"
        )
    if field == f"{role}.checkpoint" and model.as_stored.vocab_size > vocab_size:
        raise ValueError(
            f"{role}.vocab_size = {vocab_size} cuts off tokens: {tokenizer.path} has a tokenizer of {num_ids} ids "
            "with its special tokens"
        )


def build_run_datasets(config: RunConfig, student: Architecture) -> tuple[Any, Any]:
    """Return the training and the held-out dataset. Writes the index cache."""
    train = config.training
    cache = Path(config.data.cache or Path(config.output_dir) / "index_cache")
    num_train, num_valid = (batches * train.global_batch_size for batches in (train.steps, train.eval_batches))
    targets = target_fields(config)
    return build_datasets(config.data, train, cache, num_train, num_valid, student.vocab_size, targets)
