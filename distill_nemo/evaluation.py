"""Held-out metrics, for training's evaluations and for `nemo distill evaluate`.

Legend: B batch, S sequence. A `Report` maps a metric to a tensor `[sum over valid tokens, valid tokens]` of one micro
batch on one data-parallel rank; `reduce_reports` turns many of them into global token means.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from distill_nemo.data.samplers import TARGET, batches
from distill_nemo.models.distillation.objective import Targets, objective_of
from distill_nemo.models.layers.context_parallel import split_batch
from distill_nemo.runtime.watchdog import heartbeat

Report = dict[str, Tensor]
Batches = Iterator[dict[str, Tensor]]
LossFunc = Callable[[Tensor], tuple[Tensor, Tensor, Report]]
StepFunc = Callable[[Batches, nn.Module], tuple[Tensor, LossFunc]]
MICRO_BATCH_SIZE = 8  # of an evaluation outside training
HOST_FIELD = "document_starts"  # of a batch with `data.reset_at_documents`, read by the attention on the host


def evaluate(
    chunks: list[nn.Module],
    batches: list[Batches],
    *,
    num_microbatches: int,
    sequence_length: int,
    micro_batch_size: int,
    step: StepFunc | None = None,
) -> dict[str, float]:
    """Return the global token means of the next `num_microbatches` of `batches`, without gradients.

    Args:
        chunks: this pipeline stage's pieces of the model; left in eval mode.
        batches: the same stream, once for each chunk.
        num_microbatches: micro batches of this data-parallel rank.
        sequence_length: tokens of a whole sample, whatever the layout.
        micro_batch_size: samples of a micro batch.
        step: function to run on a micro batch; None for `eval_forward_step`.
    """
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=step or eval_forward_step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=chunks,
            num_microbatches=num_microbatches,
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
        )
        return reduce_reports(reports, chunks)


def evaluate_samples(model: nn.Module, samples: Any, first: int, count: int, sequence_length: int) -> dict[str, float]:
    """Return the global token means of `count` samples of a data set, which data-parallel ranks share, from `first` on.

    Args:
        model: this rank's pipeline stage.
        samples: data set of `build_datasets`.
        first: number of the first sample.
        count: number of samples, a multiple of the data-parallel ranks.
        sequence_length: tokens of a sample.
    """
    ranks = parallel_state.get_data_parallel_world_size()
    micro_batch_size = math.gcd(count // ranks, MICRO_BATCH_SIZE)
    stream = batches(
        samples,
        consumed_samples=first,
        global_batch_size=micro_batch_size * ranks,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=ranks,
    )
    return evaluate(
        [model],
        [stream],
        num_microbatches=count // ranks // micro_batch_size,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
    )


def eval_forward_step(batches: Batches, model: nn.Module) -> tuple[Tensor, LossFunc]:
    """Run the model on the next micro batch, for metrics only."""
    targets, output = run_model(batches, model)
    return output, partial(eval_loss_func, targets, model)


def run_model(batches: Batches, model: nn.Module) -> tuple[Targets, Tensor]:
    """Return the targets of this rank's part of the next micro batch, and the model's output for it.

    Valid tokens are counted on the host.
    """
    heartbeat("forward and backward passes" if torch.is_grad_enabled() else "an evaluation")
    device = next(model.parameters()).device
    own = split_batch(next(batches))
    num_valid = int((own["loss_mask"] > 0).sum())
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in own.items() if name != HOST_FIELD}
    inputs = (batch["tokens"], batch["position_ids"], own.get(HOST_FIELD))
    output = model(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
    stored = {name.removeprefix(TARGET): tensor for name, tensor in batch.items() if name.startswith(TARGET)}
    return Targets(batch["labels"], batch["loss_mask"], num_valid, stored or None), output


def eval_loss_func(targets: Targets, model: nn.Module, output_tensor: Tensor) -> tuple[Tensor, Tensor, Report]:
    """Return LM loss, valid tokens and report, without gradients; a teacher adds forward KL, agreement and entropy."""
    report, num_tokens = objective_of(model).metrics(output_tensor, targets), targets.loss_mask_BS.sum()
    return report["lm_loss"], num_tokens.int(), with_token_counts(report, num_tokens, targets)


def with_token_counts(report: dict[str, Tensor], num_valid: Tensor, targets: Targets) -> Report:
    """Pair every sum with its number of tokens: all valid ones, or against stored targets those that have them."""
    num_with_targets = num_valid
    if targets.stored is not None:
        num_with_targets = (targets.loss_mask_BS * targets.stored["has_targets"]).sum()
    of_all = ("lm_loss", "kd_loss")
    return {
        name: torch.stack([value.detach(), num_valid if name in of_all else num_with_targets])
        for name, value in report.items()
    }


def reduce_reports(reports: list[Report], chunks: list[nn.Module]) -> dict[str, float]:
    """Return global token means, the same on every rank. Over no valid token they are NaN.

    Metrics against a teacher of which no valid token has targets are left out.

    Sums run over micro batches and over data- and context-parallel ranks (one all-reduce); tensor-parallel ranks
    already agree. The last pipeline stage broadcasts them. Hidden losses are collected from the stages that have them
    and their share is added to `kd_loss`, if that is reported.
    """
    device = next(chunks[0].parameters()).device
    pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    last_stage, split = dist.get_rank() == source, dist.get_world_size(pipeline) > 1
    names: list[Any] = [sorted(reports[0]) if last_stage else None]
    hidden = _hidden_sums(chunks, device)
    if split:
        dist.broadcast_object_list(names, src=source, group=pipeline)
        dist.all_reduce(hidden, group=pipeline)
    sums = torch.zeros(len(names[0]), 2, dtype=torch.float64, device=device)
    if last_stage:
        sums += torch.stack([_total(reports, name) for name in names[0]])
    everything = torch.cat([sums.flatten(), hidden])
    dist.all_reduce(everything, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if split:
        dist.broadcast(everything, src=source, group=pipeline)
    values = everything.tolist()
    sums_of = {name: values[2 * i : 2 * i + 2] for i, name in enumerate(names[0])}
    tokens = sums_of["lm_loss"][1]
    means = {name: total / num if num else math.nan for name, (total, num) in sums_of.items() if num or not tokens}
    return means | _hidden_means(values[2 * len(names[0]) :], tokens, means, chunks) | {"valid_tokens": tokens}


def _hidden_sums(chunks: list[nn.Module], device: torch.device) -> Tensor:
    """Return the masked sums of this stage: [number of hidden losses]."""
    found = [objective_of(chunk).hidden_losses for chunk in chunks]
    sums = [losses.sums(device) for losses in found if losses is not None]
    return torch.stack(sums).sum(dim=0) if sums else torch.zeros(0, dtype=torch.float64, device=device)


def _hidden_means(
    sums: list[float], tokens: float, means: dict[str, float], chunks: list[nn.Module]
) -> dict[str, float]:
    if not sums:
        return {}
    each = {f"hidden_loss_{i}": value / tokens if tokens else math.nan for i, value in enumerate(sums)}
    found = {"hidden_loss": sum(each.values()) / len(sums)}
    balancer = objective_of(chunks[0]).balancer
    if "kd_loss" in means and balancer is not None and balancer.knows_weights:
        weight = balancer.weights()[2]
        assert weight is not None, "there are hidden losses"
        found["kd_loss"] = means["kd_loss"] + float(weight) * found["hidden_loss"]
    return found | (each if len(sums) > 1 else {})


def _total(reports: list[Report], name: str) -> Tensor:
    return torch.stack([report[name].double() for report in reports]).sum(dim=0)
