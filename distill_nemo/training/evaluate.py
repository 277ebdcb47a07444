"""Metrics of one model on held-out tokens, by the code of training's evaluations."""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from distill_nemo.checkpoint.load import check_whole
from distill_nemo.config import DataConfig, ParallelismConfig, RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from distill_nemo.data.corpora import check_corpora
from distill_nemo.data.datasets import build_datasets
from distill_nemo.data.samplers import batches
from distill_nemo.data.token_files import check_vocabulary
from distill_nemo.evaluation import evaluate
from distill_nemo.models.architecture import Models
from distill_nemo.models.provider import model_provider
from distill_nemo.models.source_check import check_source
from distill_nemo.runtime.device import resolve_dtype, setup_device
from distill_nemo.runtime.process_groups import process_groups, world_size
from distill_nemo.runtime.seed import seed_everything
from distill_nemo.training.data import check_tokenizers, checkpoints_of
from distill_nemo.training.entry import resolve_models

MICRO_BATCH_SIZE = 8


def evaluate_student(
    student: StudentConfig,
    data: str,
    teacher: TeacherConfig | None,
    sequence_length: int,
    samples: int,
    seed: int = 0,
    cache: str | None = None,
) -> dict[str, float]:
    """Return token means over `samples` sequences of the prefix `data`, in nats. Needs one process.

    Args:
        student: the model; without a checkpoint, it has the initial weights of a run with `seed`.
        data: prefix of a .bin/.idx pair.
        teacher: model to compare with, or None.
        sequence_length: tokens per sample.
        samples: number of samples; more than the data holds repeats it.
        seed: `training.seed` of the run, for a student without a checkpoint.
        cache: directory for Megatron's sample index; None for a temporary one.

    Raises:
        ValueError: for bad token files or checkpoints, or if there is more than one process.
    """
    if world_size() != 1:
        raise ValueError(f"evaluate runs in one process, not {world_size()}; start it without torchrun")
    config = RunConfig("", student, teacher)
    config.data = DataConfig(train=[data], valid=[data], sequence_length=sequence_length)
    config, models = resolve_models(config)
    check_corpora(config.data)
    check_vocabulary(config.data, models.student.vocab_size)
    check_tokenizers(config.data, checkpoints_of(config), models.student)
    for model in models:
        if model is not None:
            check_source(model)
    micro_batch_size = math.gcd(samples, MICRO_BATCH_SIZE)
    setup_device()
    with tempfile.TemporaryDirectory() as temporary, process_groups(config.parallelism):
        check_whole(student.checkpoint, teacher.checkpoint if teacher else None)
        seed_everything(seed)
        model = _model(models)
        valid: Any
        directory, vocab_size = Path(cache or temporary), models.student.vocab_size
        _, valid = build_datasets(config.data, TrainingConfig(), directory, samples, samples, vocab_size)
        stream = batches(
            valid,
            consumed_samples=0,
            global_batch_size=micro_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        means = evaluate(
            [model],
            [stream],
            num_microbatches=samples // micro_batch_size,
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
        )
    means["tokens"] = means.pop("valid_tokens")
    return means


def _model(models: Models) -> torch.nn.Module:
    return model_provider(
        student=models.student,
        teacher=models.teacher,
        parallelism=ParallelismConfig(),
        dtype=resolve_dtype("auto"),
    ).cuda()
