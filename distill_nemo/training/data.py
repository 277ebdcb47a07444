"""The datasets of a run: as many samples as its steps need; and the checks that come before them."""

import contextlib
from pathlib import Path
from typing import Any

from distill_nemo.config import RunConfig, StudentConfig
from distill_nemo.data.datasets import build_datasets, check_token_files, check_vocabulary
from distill_nemo.data.parts import load_tokenizer, open_tokenizer
from distill_nemo.models.architecture import describe_checkpoint
from distill_nemo.models.huggingface import tokenizer_files

RENAMED = 0.01  # share of ids that may name other tokens: fine-tuned models rename reserved ones


def check_run_data(config: RunConfig) -> None:
    """Refuse token files and tokenizers that do not fit the student; reads little and writes nothing.

    Raises:
        ValueError: for files that are missing, empty, truncated, or of a larger vocabulary than the model's, and for
            a student and a teacher whose ids are other tokens.
    """
    vocab_size, tokenizer = config.student.vocab_size, config.data.tokenizer
    assert vocab_size is not None, "resolved before"
    check_token_files(config.data)
    check_vocabulary(config.data, vocab_size)
    if tokenizer is not None:
        size = open_tokenizer(tokenizer, append_eod=False)[0].vocab_size
        if size > vocab_size:
            raise ValueError(
                f"data.tokenizer = {tokenizer} has {size} ids, but student.vocab_size = {vocab_size}: name the "
                "student's own tokenizer, and prepare the text with it"
            )
    check_same_tokens(config)


def check_same_tokens(config: RunConfig) -> None:
    """Compare the tokenizers that lie beside the models and that the config names, id by id.

    Vocabularies of one size may still be others, and a loss between them falls and means nothing.

    Raises:
        ValueError: with the first id that is another token; or for a `vocab_size` that cuts tokens of the student off,
            which its export would still have.
    """
    named = {
        "data.tokenizer": config.data.tokenizer,
        "student.checkpoint": config.student.checkpoint,
        "teacher.checkpoint": config.teacher.checkpoint if config.teacher else None,
    }
    known: list[tuple[str, dict[int, str]]] = []
    for field, path in named.items():
        if path and tokenizer_files(Path(path)):
            with contextlib.suppress(ValueError):  # one that cannot be loaded is not compared
                known.append((field, {i: token for token, i in load_tokenizer(path).get_vocab().items()}))
    _check_cut(config.student, max(dict(known).get("student.checkpoint", {}), default=-1) + 1)
    for field, theirs in known[1:]:
        first, ours = known[0]
        shared = sorted(ours.keys() & theirs.keys())
        apart = [i for i in shared if ours[i] != theirs[i]]
        if len(apart) > RENAMED * len(shared):
            i = apart[0]
            raise ValueError(
                f"{first} = {named[first]} and {field} = {named[field]} have different tokenizers: of {len(shared):,} "
                f"ids {len(apart):,} are other tokens, {i} say, {ours[i]!r} and {theirs[i]!r}; logits can be compared "
                "only where both models have the same tokens"
            )


def _check_cut(student: StudentConfig, num_ids: int) -> None:
    """Refuse to cut rows off that ids of the student's own tokenizer need."""
    vocab_size = student.vocab_size or 0
    if num_ids > vocab_size and describe_checkpoint(Path(student.checkpoint or "")).get("vocab_size", 0) > vocab_size:
        raise ValueError(
            f"student.vocab_size = {vocab_size} cuts off tokens: {student.checkpoint} has a tokenizer of {num_ids} ids "
            "with its special tokens"
        )


def build_run_datasets(config: RunConfig) -> tuple[Any, Any]:
    """Training and held-out dataset. Writes the index cache."""
    train = config.training
    cache = Path(config.data.cache or Path(config.output_dir) / "index_cache")
    num_valid = train.eval_batches * train.global_batch_size
    return build_datasets(config.data, train, cache, train.steps * train.global_batch_size, num_valid)
