"""`nemo distill evaluate`: figures of one checkpoint on held-out tokens, by the code that training evaluates with."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from distill_nemo.config import DataConfig, ParallelismConfig, RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from distill_nemo.data.datasets import build_datasets, check_token_files, check_vocabulary
from distill_nemo.data.samplers import batches
from distill_nemo.evaluation import evaluate
from distill_nemo.models.architecture import resolve
from distill_nemo.models.provider import model_provider
from distill_nemo.runtime.device import resolve_dtype
from distill_nemo.runtime.process_groups import process_groups
from distill_nemo.runtime.seed import seed_everything


def evaluate_checkpoint(
    student: str, data: str, teacher: str | None, sequence_length: int, samples: int, cache: str | None = None
) -> dict[str, float]:
    """Token means over `samples` sequences of the prefix `data`, in nats; needs one process.

    Args:
        student: checkpoint directory of any kind.
        data: prefix of a .bin/.idx pair.
        teacher: checkpoint directory, or None.
        sequence_length: tokens per sample.
        samples: how many; more than the data holds repeats it.
        cache: directory for Megatron's sample index.
    """
    config = RunConfig("", StudentConfig(checkpoint=student), TeacherConfig(checkpoint=teacher) if teacher else None)
    config.data = DataConfig(train=[data], valid=[data], sequence_length=sequence_length)
    check_token_files(config.data)
    with process_groups(config.parallelism):
        seed_everything(0)
        model = _model(config)
        where = Path(cache or Path(data).parent / "index_cache")
        valid: Any
        _, valid = build_datasets(config.data, TrainingConfig(), where, samples, samples)
        stream = batches(
            valid,
            consumed_samples=0,
            global_batch_size=1,
            micro_batch_size=1,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )
        means = evaluate(model, stream, num_microbatches=samples, sequence_length=sequence_length, micro_batch_size=1)
    means["tokens"] = means.pop("valid_tokens")
    return means


def _model(config: RunConfig) -> torch.nn.Module:
    student = resolve(config.student)
    assert student.vocab_size is not None, "resolve fills it"
    check_vocabulary(config.data, student.vocab_size)
    return model_provider(
        student=config.student,
        teacher=config.teacher,
        parallelism=ParallelismConfig(),
        dtype=resolve_dtype("auto"),
    ).cuda()
