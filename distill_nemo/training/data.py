"""The datasets of a run: as many samples as its steps need; and the checks that come before them."""

from pathlib import Path
from typing import Any

from distill_nemo.config import RunConfig
from distill_nemo.data.datasets import build_datasets, check_token_files, check_vocabulary
from distill_nemo.data.parts import open_tokenizer


def check_run_data(config: RunConfig) -> None:
    """Refuse token files and tokenizers that do not fit the student; reads little and writes nothing.

    Raises:
        ValueError: for files that are missing, empty, truncated, or of a larger vocabulary than the model's.
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


def build_run_datasets(config: RunConfig) -> tuple[Any, Any]:
    """Training and held-out dataset. Writes the index cache."""
    train = config.training
    cache = Path(config.data.cache or Path(config.output_dir) / "index_cache")
    num_valid = train.eval_batches * train.global_batch_size
    return build_datasets(config.data, train, cache, train.steps * train.global_batch_size, num_valid)
