"""Measure the ranges of weights and activations. The amaxes are the same at every layout."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import RowParallelLinear
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from distill_nemo.models.quantizers.convert import Quantizer, amax_of, name_in_model, quantizers_of
from distill_nemo.models.quantizers.nvfp4 import LARGEST, SMALLEST_SCALE
from distill_nemo.quantization import NVFP4, QuantizationConfig, format_of


@torch.no_grad()
def calibrate_weights(built: nn.Module, config: QuantizationConfig) -> None:
    """Set the amaxes of weights from the weights. Collective over tensor-parallel groups, those of experts too."""
    linear = format_of(config)
    found = [quantizer for quantizer in quantizers_of(built) if quantizer.of_weight]
    if linear is None or not found:
        return
    amaxes = [amax_of(each.layer.get_parameter("weight"), linear.weights) for each in found]
    parts: dict[Any, list[Tensor]] = {}  # by the group whose ranks hold parts of what has one amax
    for each, amax in zip(found, amaxes, strict=True):
        scope, group = linear.weights.scope, vars(each.layer)["tp_group"]
        if scope == "tensor" or (scope == "row" and isinstance(each.layer, RowParallelLinear)):
            parts.setdefault(group, []).append(amax)
    for group, tensors in parts.items():
        _reduce(tensors, group)
    for each, amax in zip(found, amaxes, strict=True):
        each.module.amax = _usable(amax, each.module)


@contextlib.contextmanager
def measuring(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Record the ranges of activations in forward passes, which are not quantised meanwhile; then set their amaxes.

    Collective at the end, over tensor-, data- and context-parallel ranks.
    """
    quantizers = [quantizer for chunk in chunks for quantizer in quantizers_of(chunk)]
    for each in quantizers:
        each.module.disable_quant()
        if not each.of_weight:
            each.module.enable_calib()
    try:
        yield
        set_amaxes(chunks, _shared_amaxes(chunks))
    finally:
        for each in quantizers:
            each.module.disable_calib()
            each.module.enable_quant()


def _shared_amaxes(chunks: Sequence[nn.Module]) -> dict[str, float]:
    """Return the largest values of all ranks of this pipeline stage, by name in the model."""
    measured: dict[str, Tensor] = {}
    device = next(chunks[0].parameters()).device
    for name, quantizer in _of_activations(chunks):
        calibrator = vars(quantizer.module)["_calibrator"]
        assert isinstance(calibrator, MaxCalibrator)
        amax = calibrator.compute_amax()  # None: no token came to this expert
        before = measured.setdefault(name, torch.zeros((), device=device))
        if amax is not None:
            before.copy_(torch.maximum(before, amax.float().reshape(())))
    _reduce(list(measured.values()), parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    return {name: float(amax) for name, amax in measured.items()}


def set_amaxes(chunks: Sequence[nn.Module], amaxes: dict[str, float]) -> None:
    """Set the amaxes of activations, by name in the model."""
    for name, quantizer in _of_activations(chunks):
        quantizer.module.amax = _usable(torch.tensor(amaxes[name]), quantizer.module)


def _usable(amax: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """Return amaxes that give scales. Of zeros, each is the largest of the numbers, as in ModelOpt's exporter.

    Up to `zero`, ModelOpt's quantizers round to 0, or by another amax. NaN stays.
    """
    zero = LARGEST * SMALLEST_SCALE if quantizer.num_bits == NVFP4.num_bits else 2.0**-24
    return torch.where(amax <= zero, quantizer.maxbound, amax)


def amaxes_of(chunks: Sequence[nn.Module]) -> dict[str, float]:
    """Return the amaxes of activations on this rank, by name in the model. They are NaN before calibration."""
    return {name: float(quantizer.amax) for name, quantizer in _of_activations(chunks)}


def is_calibrated(chunks: Sequence[nn.Module]) -> bool:
    """Return False if activations have no amaxes yet."""
    return not any(math.isnan(amax) for amax in amaxes_of(chunks).values())


def check_calibrated(built: nn.Module, where: object) -> None:
    """Refuse amaxes that a checkpoint `where` cannot have had from a run.

    Raises:
        ValueError: naming the quantizer.
    """
    for quantizer in quantizers_of(built):
        amax = quantizer.amax
        if not bool((amax.isfinite() & (amax > 0)).all()):
            raise ValueError(
                f"{where}: {quantizer.name} has amaxes that are not positive and finite: name another step"
            )


def _of_activations(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Quantizer]]:
    """Yield the name in the model and the quantizer. Experts of a layer share an amax, as with ModelOpt."""
    for chunk in chunks:
        for quantizer in quantizers_of(chunk):
            if not quantizer.of_weight:
                yield name_in_model(chunk, quantizer.name), quantizer


def _reduce(tensors: list[Tensor], group: Any) -> None:
    """Replace every value by the largest of the group's ranks, in one all-reduce."""
    if not tensors or dist.get_world_size(group) == 1:
        return
    joined = torch.cat([tensor.flatten() for tensor in tensors]).cuda()  # a model is built on the CPU
    dist.all_reduce(joined, dist.ReduceOp.MAX, group=group)
    for tensor, part in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
