"""The datasets of a run: as many samples as its steps need."""

from pathlib import Path
from typing import Any

from distill_nemo.config import RunConfig
from distill_nemo.data.datasets import build_datasets, check_token_files, check_vocabulary


def build_run_datasets(config: RunConfig) -> tuple[Any, Any]:
    """Training and held-out dataset, after the token files were checked.

    Raises:
        ValueError: for token files that are missing, empty, truncated, or of a larger vocabulary than the model's.
    """
    train = config.training
    assert config.student.vocab_size is not None, "resolved before"
    check_token_files(config.data)
    check_vocabulary(config.data, config.student.vocab_size)
    cache = Path(config.data.cache or Path(config.output_dir) / "index_cache")
    num_valid = train.eval_batches * train.global_batch_size
    return build_datasets(config.data, train, cache, train.steps * train.global_batch_size, num_valid)
