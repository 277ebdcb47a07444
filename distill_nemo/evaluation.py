"""Held-out figures, the same code for training's evaluations and for `nemo distill evaluate`.

Legend: B batch, S sequence. A `Report` maps a metric to a tensor `[sum over valid tokens, valid tokens]` of one micro
batch on one data-parallel rank; `reduce_reports` makes global token means of many.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import modelopt.torch.distill as mtd
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from distill_nemo.balancers import LOGITS_PREFIX
from distill_nemo.losses.vocab_parallel import (
    vocab_parallel_entropy,
    vocab_parallel_forward_kl,
    vocab_parallel_top1_agreement,
)

Report = dict[str, Tensor]
Batches = Iterator[dict[str, Tensor]]
LossFunc = Callable[[Tensor], tuple[Tensor, Tensor, Report]]


def evaluate(
    model: nn.Module, batches: Batches, *, num_microbatches: int, sequence_length: int, micro_batch_size: int
) -> dict[str, float]:
    """Global token means of the next `num_microbatches` of `batches`. The model is left in eval mode."""
    model.eval()
    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=eval_forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=num_microbatches,
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
        )
        return reduce_reports(reports, next(model.parameters()).device)


def eval_forward_step(batches: Batches, model: nn.Module) -> tuple[Tensor, LossFunc]:
    """Run the model on the next micro batch, for figures only."""
    batch, output = run_model(batches, model)
    return output, partial(eval_loss_func, batch["loss_mask"], model, labels=batch["labels"])


def run_model(batches: Batches, model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """The next micro batch, on the model's device, and the model's output for it."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    return batch, model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])


def eval_loss_func(
    loss_mask: Tensor, model: nn.Module, output_tensor: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Report]:
    """As `loss_func`, without a gradient, with what a teacher lets one measure: forward KL, agreement, entropy."""
    unwrapped: Any = unwrap_model(model)
    num_tokens = loss_mask.sum()
    report = {"lm_loss": masked_sum(output_tensor, loss_mask)}
    if isinstance(unwrapped, mtd.DistillationModel):
        report |= {name: masked_sum(x, loss_mask) for name, x in _against_teacher(unwrapped, labels).items()}
    return report["lm_loss"], num_tokens.int(), counted(report, num_tokens)


def _against_teacher(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """Per-token figures [B, S] from the captured logits; the same KL module as in training, at temperature 1."""
    student, teacher = model.output_layer._intermediate_output, model.teacher_model.output_layer._intermediate_output
    kl: Any = next(f for f in model._layers_to_loss.values() if type(f).__name__.startswith(LOGITS_PREFIX))
    pair: tuple[Tensor, Tensor] = kl.prepare(student, teacher)
    figures = {
        "forward_kl": vocab_parallel_forward_kl(*pair, 1.0, kl.group).transpose(0, 1),
        "top1_agreement": vocab_parallel_top1_agreement(*pair, kl.group).transpose(0, 1),
        "teacher_entropy": vocab_parallel_entropy(pair[1], kl.group).transpose(0, 1),
        "teacher_lm_loss": type(model.teacher_model).compute_language_model_loss(
            model.teacher_model, labels, pair[1].float().clone()
        ),
    }
    for student_layer, teacher_layer in model._layers_to_loss:
        student_layer._intermediate_output = teacher_layer._intermediate_output = None
    return figures


def masked_sum(values_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
    """Sum over valid tokens, fp32. A masked token cannot leak: not even a NaN times zero."""
    return torch.where(loss_mask_BS > 0, values_BS.float() * loss_mask_BS, 0.0).sum()


def counted(report: dict[str, Tensor], num_tokens: Tensor) -> Report:
    """Pair every sum with the number of tokens it runs over."""
    return {name: torch.stack([value.detach(), num_tokens]) for name, value in report.items()}


def reduce_reports(reports: list[Report], device: torch.device) -> dict[str, float]:
    """Global token means, the same on every rank.

    Sums run over micro batches, data- and context-parallel ranks (one all-reduce); tensor-parallel ranks already
    agree. The last pipeline stage then tells the others. A metric over no valid token is NaN.
    """
    last_stage = parallel_state.is_pipeline_last_stage()
    names: list[Any] = [sorted(reports[0]) if last_stage else None]
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast_object_list(names, src=source, group=group)
    sums = torch.zeros(len(names[0]), 2, dtype=torch.float64, device=device)
    if last_stage:
        sums += torch.stack([_total(reports, name) for name in names[0]])
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(sums, src=source, group=group)
    values = sums.tolist()
    means = {n: (total / tokens if tokens else math.nan) for n, (total, tokens) in zip(names[0], values, strict=True)}
    return means | {"valid_tokens": values[0][1]}


def _total(reports: list[Report], name: str) -> Tensor:
    return torch.stack([report[name].double() for report in reports]).sum(dim=0)
