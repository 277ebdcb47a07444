"""Metrics of one model on held-out tokens, by the code of training's evaluations."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state

from distill_nemo.checkpoint.load import check_whole
from distill_nemo.checks import check_layout_without_training
from distill_nemo.config import (
    DataConfig,
    DistillationConfig,
    ParallelismConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from distill_nemo.data.corpora import check_corpora, corpus_at
from distill_nemo.data.datasets import build_datasets, check_number_of_samples
from distill_nemo.data.token_files import check_vocabulary
from distill_nemo.evaluation import evaluate_samples
from distill_nemo.models.architecture import Models
from distill_nemo.models.provider import model_provider
from distill_nemo.models.source_check import refusal_of_sources
from distill_nemo.runtime.device import resolve_dtype, setup_device
from distill_nemo.runtime.everyone import Everyone
from distill_nemo.runtime.process_groups import is_joined, process_groups, raise_everywhere, rank, world_size
from distill_nemo.runtime.seed import seed_everything
from distill_nemo.training.data import check_tokenizers, checkpoints_of
from distill_nemo.training.entry import resolve_models


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
    whole = DataConfig(train=[data], valid=[data], sequence_length=sequence_length)
    corpus_at(whole.train[0]).check("data", whole)
    return evaluate_on(whole, student, teacher, samples, ParallelismConfig(), seed, cache)


def evaluate_on(
    data: DataConfig,
    student: StudentConfig,
    teacher: TeacherConfig | None,
    samples: int,
    parallelism: ParallelismConfig,
    seed: int = 0,
    cache: str | None = None,
    cache_field: str = "output",
    offload_teacher: bool = False,
) -> dict[str, float]:
    """Return token means over the held-out text of `data`, in nats, the same on every rank. Every rank calls it.

    Args:
        data: as a run states it.
        student: as `evaluate_student`.
        teacher: as `evaluate_student`.
        samples: number of samples, rounded up to a multiple of the data-parallel ranks.
        parallelism: layout of both models.
        seed: as `evaluate_student`.
        cache: directory for Megatron's sample index, which all ranks see; None for a temporary one, of one process.
        cache_field: field of the command that decides `cache`, for errors.
        offload_teacher: keep the weights of the teacher's layers in host memory, as `distillation.offload_teacher`.

    Raises:
        ValueError: for bad token files or checkpoints, or a layout that does not fit the models or ranks.
    """
    models = check_evaluation(data, student, teacher, parallelism)
    refusal = refusal_of_sources(*models) if rank() == 0 or is_joined() else None
    copies = world_size() // parallelism.model_parallel_size
    count = -(-samples // copies) * copies
    setup_device()
    with tempfile.TemporaryDirectory() as temporary, process_groups(parallelism):
        raise_everywhere(refusal)
        Everyone().on_rank_0(partial(check_number_of_samples, f"samples = {samples}", count))
        check_whole(student.checkpoint, teacher.checkpoint if teacher else None)
        seed_everything(seed)
        model = _model(models, parallelism, DistillationConfig(offload_teacher=offload_teacher))
        directory, vocab_size = Path(cache or temporary), models.student.vocab_size
        where = cache_field if cache else "TMPDIR"
        _, valid = build_datasets(data, TrainingConfig(), directory, samples, count, vocab_size, None, where)
        means = evaluate_samples(model, valid, 0, count, data.sequence_length)
    means["tokens"] = means.pop("valid_tokens")
    return means


def check_evaluation(
    data: DataConfig, student: StudentConfig, teacher: TeacherConfig | None, parallelism: ParallelismConfig
) -> Models:
    """Refuse what `evaluate_on` cannot evaluate, as far as descriptions and headers say. Return the architectures.

    Raises:
        ValueError: as `evaluate_on`.
    """
    check_layout_without_training(parallelism, world_size())
    config, models = resolve_models(RunConfig("", student, teacher, data=data, parallelism=parallelism))
    check_corpora(config.data)
    check_vocabulary(config.data, models.student.vocab_size)
    check_tokenizers(config.data, checkpoints_of(config), models.student)
    return models


def _model(models: Models, parallelism: ParallelismConfig, distillation: DistillationConfig) -> torch.nn.Module:
    return model_provider(
        parallel_state.is_pipeline_first_stage(),
        parallel_state.is_pipeline_last_stage(),
        student=models.student,
        teacher=models.teacher,
        parallelism=parallelism,
        distillation=distillation,
        dtype=resolve_dtype("auto"),
    ).cuda()
