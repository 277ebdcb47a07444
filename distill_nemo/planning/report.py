"""Text of a plan, on one screen."""

from distill_nemo.config import ParallelismConfig
from distill_nemo.data.token_files import check_vocabulary
from distill_nemo.planning.compute import all_work, checkpoint_bytes, copied_bytes, time_of, traffic_bytes
from distill_nemo.planning.corpora import MANY_PASSES, parts_of_blend
from distill_nemo.planning.gpus import Gpu
from distill_nemo.planning.memory import Memory, chunk_rows, fullest, in_flight
from distill_nemo.planning.parameters import total_parameters
from distill_nemo.planning.planned import PlannedRun

GB, TFLOP, GFLOP = 1e9, 1e12, 1e9


def report(name: str, planned: PlannedRun, gpu: Gpu, utilisation: float) -> str:
    """Return everything that is known of a run before it starts."""
    memory = fullest(planned)
    parts = (
        heading(name, planned, gpu),
        _parameters(planned),
        _memory(planned, memory, gpu),
        _work(planned, memory),
        _time(planned, gpu, utilisation),
        _data(planned),
        _schedules(planned),
    )
    return "\n\n".join("\n".join(part) for part in parts if part)


def heading(name: str, planned: PlannedRun, gpu: Gpu) -> list[str]:
    """Return the lines that name GPUs, layout and numbers."""
    head = f"{name} on {planned.world_size} x {gpu.name} ({gpu.memory_gb:g} GB, {gpu.bf16_tflops:,g} TFLOPS)"
    kind = "bf16" if planned.item == 2 else "fp32"
    layers = "Transformer Engine" if planned.transformer_engine else "local layers"
    layout = layout_text(planned.config.parallelism, planned.data_parallel_size)
    return [head, f"  {layout}, {kind}, {layers}{_quantized(planned)}"]


def _quantized(planned: PlannedRun) -> str:
    numbers = planned.models.student.quantization
    if numbers is None:
        return ""
    parts = {"": numbers.format, "cache in ": numbers.kv_cache}
    named = " and ".join(part + name for part, name in parts.items() if name != "none")
    return f"; student quantised: {named}"


def layout_text(par: ParallelismConfig, data_parallel_size: int | None = None) -> str:
    """Return the sizes of a layout above 1: tensor 2 x data 8, sequence parallel."""
    sizes = {
        "tensor": par.tensor_model_parallel_size,
        "pipeline": par.pipeline_model_parallel_size,
        "context": par.context_parallel_size,
        "data": data_parallel_size,
    }
    layout = " x ".join(f"{kind} {size}" for kind, size in sizes.items() if size and (size > 1 or kind == "data"))
    virtual = par.virtual_pipeline_model_parallel_size
    more = [f"virtual pipeline {virtual}"] if virtual else []
    more += [f"expert {par.expert_model_parallel_size}"] if par.expert_model_parallel_size > 1 else []
    more += ["sequence parallel"] if par.sequence_parallel else []
    return ", ".join([layout, *more] if layout else more)


def _parameters(planned: PlannedRun) -> list[str]:
    ranks = range(planned.config.parallelism.pipeline_model_parallel_size)
    rows = [f"{'parameters':28}{'in all':>16}{'on the largest rank':>24}"]
    for role, model, on_rank in (
        ("student", planned.models.student, planned.student),
        ("teacher", planned.models.teacher, planned.teacher),
    ):
        if model is not None:
            most = max(on_rank(rank).total for rank in ranks)
            rows.append(f"  {role:26}{total_parameters(model):16,}{most:24,}")
    return rows


def _memory(planned: PlannedRun, memory: Memory, gpu: Gpu) -> list[str]:
    train, stages = planned.config.training, planned.config.parallelism.pipeline_model_parallel_size
    where = f" (pipeline rank {memory.rank} of {stages})" if stages > 1 else ""
    moment = memory.moment
    kept = {"others": in_flight(planned, memory.rank) - 1, "all": in_flight(planned, memory.rank)}
    count = kept[memory.before[moment]]
    about = {
        "gradients": "fp32",
        "optimizer": f"{'fp32 masters and ' if planned.item == 2 else ''}Adam's fp32 moments{_over(planned)}",
        "activations": f"{count:g} x {planned.tokens:,} tokens, recompute: {train.recompute or 'none'}",
        moment: "the moment that needs most" + _chunks(planned, moment),
        **({"teacher's weights": "one layer at a time"} if planned.config.distillation.offload_teacher else {}),
    }
    rows = memory.stays | {"activations": memory.activations[moment], moment: memory.workspace[moment]}
    lines = [f"memory of the fullest rank{where}, GB"]
    lines += [f"  {part:26}{size / GB:10.2f}   {about.get(part, '')}".rstrip() for part, size in rows.items() if size]
    lines.append(f"  {'total':26}{memory.total / GB:10.2f}   {fit_text(memory, gpu)}")
    if "the loss" in memory.workspace and moment != "the loss":
        loss = memory.workspace["the loss"] / GB
        lines.append(f"  {'(the loss':26}{loss:10.2f}   at another moment{_chunks(planned, 'the loss')})")
    return lines


def fit_text(memory: Memory, gpu: Gpu) -> str:
    """Return the GPU's memory and what is left of it."""
    room = gpu.memory_gb - memory.total / GB
    fits = f"fits, {room:.1f} left" if room >= 0 else f"does not fit, {-room:.1f} too much"
    return f"of {gpu.memory_gb:g}: {fits}"


def _over(planned: PlannedRun) -> str:
    copies = planned.data_parallel_size * planned.config.parallelism.context_parallel_size
    spread = planned.config.optimizer.use_distributed_optimizer and copies > 1
    return f", spread over {copies} ranks" if spread else ""


def _chunks(planned: PlannedRun, moment: str) -> str:
    if moment != "the loss":
        return ""
    return f", logits of {chunk_rows(planned):,} tokens at a time" if planned.fused else ", from whole logits"


def _work(planned: PlannedRun, memory: Memory) -> list[str]:
    work, length = all_work(planned), planned.config.data.sequence_length
    tokens = planned.config.training.global_batch_size * length
    parts = [f"student {work.student / GFLOP:,.1f}"]
    parts += [f"recomputation {work.recompute / GFLOP:,.1f}"] if work.recompute else []
    parts += [f"teacher {work.teacher / GFLOP:,.1f}"] if work.teacher else []
    batch = f"{tokens:,} tokens: {planned.config.training.global_batch_size} x {length:,}"
    traffic = "weights, gradients and optimizer read and written, a rank and step"
    copied = copied_bytes(planned, memory.rank)
    held = planned.item * planned.in_host_memory(memory.rank) / GB
    kept = f"{held:,.2f} of the teacher in host memory (pinned: up to twice that), for every micro batch"
    return [
        "work",
        f"  {'GFLOP a token':26}{work.total / GFLOP:10,.1f}   {', '.join(parts)}",
        f"  {'TFLOP a step':26}{work.total * tokens / TFLOP:10,.0f}   {batch}",
        f"  {'memory traffic, GB':26}{traffic_bytes(planned, memory.rank) / GB:10,.1f}   {traffic}",
        *([f"  {'copied to the GPU, GB':26}{copied / GB:10,.1f}   {kept}"] if copied else []),
        f"  {'checkpoint, GB':26}{checkpoint_bytes(planned) / GB:10,.1f}   {_kept(planned)}",
    ]


def _kept(planned: PlannedRun) -> str:
    save = planned.config.checkpoint
    interval = planned.config.training.benchmark_interval
    measured = f", and each of step {interval:,}, {2 * interval:,}, ... until it is measured" if interval else ""
    return f"every {save.save_interval:,} steps; the last {save.keep_last} are kept{measured}"


def _data(planned: PlannedRun) -> list[str]:
    """Return the passes over each part of the training data, if it is there.

    Raises:
        ValueError: for data that the run would refuse.
    """
    check_vocabulary(planned.config.data, planned.models.student.vocab_size)
    lines = []
    for part in parts_of_blend(planned.config):
        about = f"{part.share:.0%} of the run, from {part.tokens:,} tokens"
        about += "" if part.valid_share in (None, 1.0) else f", of which {part.valid_share:.0%} count"
        about += f"; {part.note}" if part.note else ""
        about += f"; more than {MANY_PASSES}: add data" if part.passes > MANY_PASSES else ""
        lines.append(f"  {part.prefix[-26:]:26}{part.passes:10,.2f}   {about}")
    return ["data, passes", *lines] if lines else []


def _schedules(planned: PlannedRun) -> list[str]:
    schedules = planned.config.distillation.parsed_schedules
    return ["schedules", *(f"  {name:26}{schedule}" for name, schedule in schedules.items())] if schedules else []


def _time(planned: PlannedRun, gpu: Gpu, utilisation: float) -> list[str]:
    train, time = planned.config.training, time_of(planned, gpu.bf16_tflops, utilisation)
    tokens = train.global_batch_size * planned.config.data.sequence_length
    hours, evaluations = (time.training + time.evaluations) / 3600, time.evaluations / 3600
    rows = [
        f"time, if GPUs reach {utilisation:g} of their peak (assumed: utilisation=)",
        f"  {'seconds a step':26}{time.step:10,.2f}   {tokens / time.step:,.0f} tokens a second",
        f"  {'hours':26}{hours:10,.2f}   {train.steps:,} steps; evaluations {evaluations:.2f} of it",
        f"  {'GPU-hours':26}{hours * planned.world_size:10,.1f}",
    ]
    if planned.config.parallelism.pipeline_model_parallel_size > 1:
        why = f"{planned.num_microbatches} micro batches a step, and the slowest rank's pace"
        rows.insert(2, f"  {'idle in the pipeline':26}{time.idle:10.0%}   {why}")
    left_out = ["communication", "data", "saving"]
    left_out += ["copies from host memory"] if planned.config.distillation.offload_teacher else []
    left_out += ["the benchmarks' own GPUs"] if planned.config.benchmarks.tasks else []
    return [
        *rows,
        f"not included: {', '.join(left_out)}; assumes valid tokens only and experts equally busy",
    ]
