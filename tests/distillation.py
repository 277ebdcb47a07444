"""One global batch of a distillation, in Megatron on any layout and in transformers on fp64; tests compare the two.

The reference shares nothing with the package but the weight files. Megatron's gradients travel as a checkpoint: they
take the place of the weights, are saved at the layout, and the exporter gives them Hugging Face's names and shapes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from distill_nemo.config import DistillationConfig, ParallelismConfig, RunConfig, StudentConfig, TeacherConfig

GLOBAL_BATCH, MICRO_BATCH, SEQUENCE, VOCAB = 4, 1, 16, 507
FP64: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}  # torch's grouped_mm has no fp64


@dataclass
class Layout:
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    expert: int = 1

    def config(self) -> ParallelismConfig:
        return ParallelismConfig(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            sequence_parallel=self.sequence_parallel,
            expert_model_parallel_size=self.expert,
        )


@dataclass
class Case:
    """What is distilled into what; `distillation` holds fields of `DistillationConfig`."""

    student: str
    teacher: str | None
    distillation: dict[str, Any] = field(default_factory=dict)
    masked: str = "some"  # some | first (every token of the first sample) | all

    def batch(self) -> dict[str, torch.Tensor]:
        """The global batch: tokens, labels, loss_mask and position_ids, each [GLOBAL_BATCH, SEQUENCE]."""
        generator = torch.Generator().manual_seed(5)
        text = torch.randint(VOCAB, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
        mask = (torch.rand(GLOBAL_BATCH, SEQUENCE, generator=generator) > 0.3).float()
        mask[0] *= self.masked != "first"
        mask *= self.masked != "all"
        positions = torch.arange(SEQUENCE).expand(GLOBAL_BATCH, -1)
        return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "position_ids": positions}

    def run_config(self, output: str, layout: Layout) -> RunConfig:
        teacher = TeacherConfig(checkpoint=self.teacher) if self.teacher else None
        kd, parallelism = DistillationConfig(**self.distillation), layout.config()
        run = RunConfig(output, StudentConfig(checkpoint=self.student), teacher, kd, parallelism)
        run.data.sequence_length = SEQUENCE
        run.optimizer.use_distributed_optimizer = False  # it keeps a slice of the gradients only
        run.optimizer.warmup_steps, run.training.steps = 0, 2
        return run


def megatron_step(case: Case, layout: Layout, output: str) -> dict[str, float]:
    """Forward and backward of the global batch on this rank; the gradients saved as a checkpoint below `output`."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    from distill_nemo.training.entry import resolve_models

    run = resolve_models(case.run_config(output, layout))
    with process_groups(run.parallelism):
        return _step(case, run, output)


def _step(case: Case, run: RunConfig, output: str) -> dict[str, float]:
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from distill_nemo.checkpoint.save import CheckpointWriter
    from distill_nemo.evaluation import reduce_reports
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.forward_step import forward_step
    from distill_nemo.training.setup import build_trainee

    seed_everything(0)
    trainee = build_trainee(run, torch.float32, load_weights=True)
    for chunk in trainee.chunks:
        chunk.train()
    share = GLOBAL_BATCH // ps.get_data_parallel_world_size()
    first = ps.get_data_parallel_rank() * share
    batch = case.batch()
    micro = [{k: v[i : i + MICRO_BATCH] for k, v in batch.items()} for i in range(first, first + share, MICRO_BATCH)]
    reports: Any = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(micro), model=trainee.chunks,
        num_microbatches=len(micro), seq_length=SEQUENCE, micro_batch_size=MICRO_BATCH, forward_only=False,
    )  # fmt: skip
    means = reduce_reports(reports, trainee.chunks)
    for name, parameter in [named for chunk in trainee.unwrapped for named in chunk.named_parameters()]:
        if parameter.requires_grad:
            gradient: Any = parameter.main_grad
            assert gradient.isfinite().all(), name
            parameter.data.copy_(gradient)
    writer = CheckpointWriter(Path(output) / "checkpoints", run)
    writer.save(1, trainee.unwrapped, trainee.optimizer, trainee.scheduler, {"step": 1})
    return means


def gradients(output: str) -> dict[str, torch.Tensor]:
    """The gradients that `megatron_step` saved, by transformers' parameter names; needs one process."""
    from safetensors.torch import load_file

    from distill_nemo.checkpoint.export import export

    export(output, f"{output}/hf", None)
    return load_file(f"{output}/hf/model.safetensors")


def reference(case: Case) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(global token means, gradients) by transformers and torch in fp64. Sums over valid tokens, divided by them."""
    from transformers import AutoModelForCausalLM

    kd = DistillationConfig(**case.distillation)
    batch = case.batch()
    mask = batch["loss_mask"].double()
    student: Any = AutoModelForCausalLM.from_pretrained(case.student, **FP64)
    ours = student(batch["tokens"], output_hidden_states=True)
    log_q = functional.log_softmax(ours.logits / kd.temperature, -1)
    lm = functional.cross_entropy(ours.logits.transpose(1, 2), batch["labels"], reduction="none")
    losses = {"lm_loss": lm}
    weights = {"lm_loss": kd.lm_weight if case.teacher else 1.0}
    if case.teacher:
        teacher: Any = AutoModelForCausalLM.from_pretrained(case.teacher, **FP64)
        with torch.no_grad():
            theirs = teacher(batch["tokens"], output_hidden_states=True)
        log_p = functional.log_softmax(theirs.logits / kd.temperature, -1)
        losses["logit_loss"] = (log_p.exp() * (log_p - log_q)).sum(-1) * kd.temperature**2
        weights["logit_loss"] = kd.logits_weight
        if kd.hidden_loss:
            a, b = ours.hidden_states[-1], theirs.hidden_states[-1]  # transformers gives them after the final norm
            mse, cosine = (a - b).square().mean(-1), 1 - functional.cosine_similarity(a, b, dim=-1)
            losses["hidden_loss"] = mse if kd.hidden_loss == "mse" else cosine
            weights["hidden_loss"] = kd.hidden_weight
    means = {name: (loss * mask).sum() / mask.sum().clamp(min=1) for name, loss in losses.items()}
    torch.stack([weights[name] * mean for name, mean in means.items()]).sum().backward()
    return {n: m.item() for n, m in means.items()}, {n: p.grad for n, p in student.named_parameters()}
