"""Seconds that ranks spend moving data, in a step, if none of it overlaps with computing.

Ranks are numbered as in Megatron: tensor-, context-, data-, pipeline-parallel neighbours, from the closest to the
farthest. A group that fits a node uses NVLink, a larger one the network. Latency is left out.
"""

from collections import Counter

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.planning.compute import traffic_bytes
from distill_nemo.planning.gpus import NODE, Gpu
from distill_nemo.planning.parameters import rank_layers
from distill_nemo.planning.planned import PlannedRun


def moving_seconds(planned: PlannedRun, gpu: Gpu) -> float:
    """Return the seconds of a step on pipeline rank 0, which has as many layers as any other.

    They are those of memory traffic, tensor, context, expert, pipeline and data parallelism.
    """
    par = planned.config.parallelism
    tensor, context = par.tensor_model_parallel_size, par.context_parallel_size
    student, teacher = planned.models
    again = planned.config.training.recompute == "full"
    passes = [(student, 3 + again)] + ([(teacher, 1)] if teacher is not None else [])  # in units of a forward pass

    of_tensor = of_context = of_experts = 0.0
    for model, times in passes:
        for layer, number in Counter(rank_layers(model, par, 0)).items():
            of_tensor += number * times * _tensor_bytes(planned, model, layer)
            of_context += number * times * _context_bytes(planned, model, layer)
            of_experts += number * times * _expert_bytes(planned, model, layer)
    micro_batch = (
        of_tensor / _ring_bandwidth(gpu, 1, tensor)
        + of_context / _ring_bandwidth(gpu, tensor, context)
        + of_experts / _bandwidth(gpu, tensor * par.expert_model_parallel_size)
        + _pipeline_bytes(planned) / _bandwidth(gpu, planned.world_size)
    )
    copies = planned.world_size // (tensor * par.pipeline_model_parallel_size)
    step = _data_bytes(planned) / _ring_bandwidth(gpu, tensor, copies)
    return planned.num_microbatches * micro_batch + step + traffic_bytes(planned, 0) / (1e9 * gpu.memory_gbs)


def _bandwidth(gpu: Gpu, span: int) -> float:
    """Return the bytes per second that a rank sends to single ranks in a group that reaches over `span` ranks."""
    return 1e9 * (gpu.nvlink_gbs if span <= NODE else gpu.network_gbs)


def _ring_bandwidth(gpu: Gpu, stride: int, size: int) -> float:
    """Return the bytes per second of a collective over `size` ranks, `stride` apart.

    Rings leave a node through the network cards of all its members, a share of the data through each.
    """
    if stride * size <= NODE:
        return 1e9 * gpu.nvlink_gbs
    return 1e9 * min(gpu.nvlink_gbs, gpu.network_gbs * max(NODE // stride, 1))


def _others(size: int) -> float:
    """Return the share of a gathered tensor that comes from other ranks."""
    return (size - 1) / size


def _tensor_bytes(planned: PlannedRun, model: Architecture, layer: Layer) -> float:
    """Return the bytes of a layer's forward: attention and MLP each gather their input and scatter their output."""
    parts = (layer.mixer is not None or layer.num_query_groups is not None) + (layer.ffn_hidden_size is not None)
    whole = planned.item * planned.tokens * model.hidden_size
    return 2 * parts * _others(planned.config.parallelism.tensor_model_parallel_size) * whole


def _context_bytes(planned: PlannedRun, model: Architecture, layer: Layer) -> float:
    """Return the bytes of a layer's forward pass: keys and values of all other ranks."""
    par = planned.config.parallelism
    groups = max((layer.num_query_groups or 0) // par.tensor_model_parallel_size, 1)
    return (par.context_parallel_size - 1) * planned.item * planned.tokens * 2 * groups * model.kv_channels


def _expert_bytes(planned: PlannedRun, model: Architecture, layer: Layer) -> float:
    """Return the bytes of a layer's forward pass: tokens go to their experts and come back."""
    if not layer.has_experts or model.experts is None:
        return 0.0
    rows = planned.split_tokens * model.experts.num_experts_per_tok
    return 2 * _others(planned.expert_parallel_size(model)) * planned.item * rows * model.hidden_size


def _pipeline_bytes(planned: PlannedRun) -> float:
    """Return the bytes of a micro batch: the student's hidden states and their gradient, and the teacher's states."""
    student, teacher = planned.models
    width = 2 * student.hidden_size + (teacher.hidden_size if teacher is not None else 0)
    return planned.item * planned.split_tokens * width if planned.config.parallelism.num_stages > 1 else 0.0


def _data_bytes(planned: PlannedRun) -> float:
    """Return the bytes of a step: fp32 gradients are reduced, and the updated weights gathered."""
    copies = planned.data_parallel_size * planned.config.parallelism.context_parallel_size
    return _others(copies) * (4 + planned.item) * planned.student(0).total
