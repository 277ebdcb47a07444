"""Operations, bytes and time of a run.

A product of [a, b] and [b, c] is 2abc operations. A backward pass is two forward passes. Attention is causal and
computes half of the scores, or those in a sliding window. Norms, softmax, the divergence and Adam are left out.
"""

from collections import Counter
from dataclasses import dataclass

from distill_nemo.models.architecture import Architecture, Layer, padded_vocab_size
from distill_nemo.planning.delta_nets import delta_net_flops
from distill_nemo.planning.latent_attention import latent_attention_flops
from distill_nemo.planning.mamba import mamba_flops
from distill_nemo.planning.parameters import layers_of_stage, stages_of, total_parameters
from distill_nemo.planning.planned import PlannedRun


def seen_keys(layer: Layer, length: int) -> float:
    """Return the keys that a token of a sequence of `length` sees on average, half of its own counted."""
    window = layer.window or length
    return window - (window * (window - 1) / length + 1) / 2  # half of all without a window


def layer_flops(model: Architecture, layer: Layer, length: int) -> tuple[float, float]:
    """Return forward operations per token of a sequence of `length`: in total, and of the core attention."""
    products = core = 0.0
    if layer.mixer == "mamba":
        products += mamba_flops(model, length)
    elif layer.mixer == "latent_attention":
        products, core = latent_attention_flops(model, seen_keys(layer, length))
    elif layer.mixer == "gated_delta_net":
        products += delta_net_flops(model)
    elif layer.num_query_groups is not None:
        n, k = model.num_attention_heads * model.kv_channels, layer.num_query_groups * model.kv_channels
        products += 2 * model.hidden_size * (n * (2 if model.output_gate else 1) + 2 * k) + 2 * n * model.hidden_size
        core = 4 * seen_keys(layer, length) * n  # scores, and their product with the values
    if layer.ffn_hidden_size is not None:
        products += (6 if model.gated else 4) * model.hidden_size * model.ffn_per_token(layer)
        if layer.has_experts and model.experts is not None:
            products += 2 * model.hidden_size * (model.experts.num_experts + model.experts.has_shared_gate)
    return products + core, core


def stage_flops(planned: PlannedRun, model: Architecture, stage: int, output: bool) -> tuple[float, float, float]:
    """Return forward operations per token on a stage: of the layers, of their core attention, of the output layer."""
    par, length = planned.config.parallelism, planned.config.data.sequence_length
    total = core = 0.0
    for layer, number in Counter(layers_of_stage(model, par, stage)).items():
        of_layer, of_core = layer_flops(model, layer, length)
        total, core = total + number * of_layer, core + number * of_core
    last = output and stage == par.num_stages - 1
    head = 2 * model.hidden_size * padded_vocab_size(model.vocab_size) if last else 0
    return total, core, head


@dataclass(frozen=True)
class Work:
    """Operations per token, by purpose."""

    student: float  # forward and backward
    recompute: float
    teacher: float
    evaluation: float  # forward passes of both

    @property
    def total(self) -> float:
        """Operations per token of a training step."""
        return self.student + self.recompute + self.teacher


def rank_work(planned: PlannedRun, rank: int) -> Work:
    """Return the operations per token of one pipeline rank's stages."""
    config, models, student, again, teacher = planned.config, planned.models, 0.0, 0.0, 0.0
    for stage in stages_of(config.parallelism, rank):
        layers, core, head = stage_flops(planned, models.student, stage, True)
        student += layers + head
        again += {"full": layers, "selective": core}.get(config.training.recompute or "", 0.0)
        if models.teacher is not None:
            teacher += sum(stage_flops(planned, models.teacher, stage, planned.config.distillation.uses_logits)[::2])
    return Work(3 * student, again, teacher, student + teacher)


def rank_works(planned: PlannedRun) -> list[Work]:
    """Return the operations per token of every pipeline rank."""
    return [rank_work(planned, rank) for rank in range(planned.config.parallelism.pipeline_model_parallel_size)]


def all_work(planned: PlannedRun) -> Work:
    """Return the operations per token of all pipeline ranks together."""
    works = rank_works(planned)
    return Work(*(sum(getattr(work, name) for work in works) for name in Work.__dataclass_fields__))


@dataclass(frozen=True)
class Time:
    """Seconds."""

    step: float
    idle: float  # average share of a step in which a rank waits, for the pipeline to fill or for a slower stage
    training: float
    evaluations: float


def time_of(planned: PlannedRun, tflops: float, utilisation: float) -> Time:
    """Estimate the time of a run whose ranks reach `utilisation` of `tflops` while they compute.

    A pipeline runs at the pace of its slowest rank. Filling it costs `(ranks - 1) / virtual` micro batches.
    """
    return time_of_work(planned, rank_works(planned), tflops, utilisation)


def time_of_work(planned: PlannedRun, works: list[Work], tflops: float, utilisation: float) -> Time:
    """Estimate the time of a run whose pipeline ranks have this work."""
    config, par = planned.config, planned.config.parallelism
    pipeline, count = par.pipeline_model_parallel_size, planned.num_microbatches
    tokens = config.training.micro_batch_size * config.data.sequence_length
    rate = tflops * 1e12 * utilisation * par.tensor_model_parallel_size * par.context_parallel_size
    passes = count + (pipeline - 1) / (par.virtual_pipeline_model_parallel_size or 1)
    step = passes * max(work.total for work in works) * tokens / rate
    busy = count * sum(work.total for work in works) / pipeline * tokens / rate
    evaluation = passes * max(work.evaluation for work in works) * tokens / rate
    train = config.training
    evaluations = 1 + -(-train.steps // train.eval_interval)
    return Time(step, 1 - busy / step, train.steps * step, evaluations * train.eval_batches * evaluation)


def traffic_bytes(planned: PlannedRun, rank: int) -> float:
    """Return the bytes of GPU memory that weights, gradients and optimizer move in a step. Activations are left out.

    A micro batch reads the student's weights in forward and backward, and once more if layers are recomputed. It reads
    the teacher's once, and adds to fp32 gradients. The optimizer reads these, and reads and writes masters and moments.
    """
    student, teacher = planned.student(rank).total, planned.teacher(rank).total
    reads = 3 if planned.config.training.recompute == "full" else 2
    each = planned.item * (reads * student + teacher) + 8 * student
    return planned.num_microbatches * each + (4 + 24 + planned.item) * planned.shards(planned.student(rank))


def copied_bytes(planned: PlannedRun, rank: int) -> float:
    """Return the bytes that a rank copies from host memory in a step: an offloaded teacher's layers per micro batch."""
    return planned.num_microbatches * planned.item * planned.in_host_memory(rank)


def checkpoint_bytes(planned: PlannedRun) -> float:
    """Return the bytes of a saved step: the student's weights, fp32 masters and Adam's two moments."""
    return (planned.item + 12) * total_parameters(planned.models.student)
