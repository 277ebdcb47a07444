"""Print the plan of a compression: every stage's memory, hours and GPU-hours. Builds no model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill_nemo.config import ParallelismConfig, RunConfig, StudentConfig, TrainingConfig
from distill_nemo.evaluation import MICRO_BATCH_SIZE
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture, Models
from distill_nemo.models.families.tensors import num_parameters
from distill_nemo.planning import memory
from distill_nemo.planning.activations import forward_workspace
from distill_nemo.planning.compute import stage_flops, time_of
from distill_nemo.planning.gpus import Gpu, check_utilisation
from distill_nemo.planning.parameters import rank_layers
from distill_nemo.planning.plan import planned_run, print_plan
from distill_nemo.planning.planned import PlannedRun
from distill_nemo.planning.report import GB, layout_text
from distill_nemo.pruning.foreseen import Round
from distill_nemo.pruning.sizes import predicted
from distill_nemo.pruning.stages import CompressConfig
from distill_nemo.reports.comparison import count

COPIES_OF_LOGITS = 3  # in fp32: logits, their exponentials, and a difference


@dataclass(frozen=True)
class StagePlan:
    """Memory and time of one stage."""

    name: str
    ranks: int
    num_bytes: float  # on the fullest rank
    seconds: float
    about: str

    @property
    def gpu_hours(self) -> float:
        """Hours of all ranks together."""
        return self.ranks * self.seconds / 3600


def print_compress_plan(
    config: CompressConfig,
    rounds: Sequence[Round],
    few: int,
    ranks: int,
    gpu: Gpu,
    utilisation: float,
    transformer_engine: bool,
) -> None:
    """Print a row for every stage, then the plan of each distillation.

    Args:
        config: the compression.
        rounds: of it, foreseen.
        few: ranks that prune and evaluate.
        ranks: that distil.
        gpu: model of the GPUs.
        utilisation: share of the GPU's peak that is reached, above 0 and at most 1.
        transformer_engine: True if its layers are used.

    Raises:
        ValueError: after printing, for a stage that does not fit, with what would.
    """
    check_utilisation(utilisation)
    stages = plan_stages(rounds, few, ranks, gpu, utilisation, transformer_engine)
    print("\n".join(_table(config, stages, gpu, utilisation)))
    for each in stages:
        too_much = each.num_bytes / GB - gpu.memory_gb
        advice = "take GPUs with more memory, or a layout that divides the model further (parallelism.*)"
        require(
            too_much <= 0 or each.name.startswith("distil"),
            f"{each.name} does not fit: {too_much:.1f} GB too much on a {gpu.name} of {gpu.memory_gb:g} GB; {advice}",
        )
    for each in rounds:
        print()
        print_plan(each.run.output_dir, each.run, ranks, gpu, utilisation, transformer_engine)


def plan_stages(
    rounds: Sequence[Round], few: int, ranks: int, gpu: Gpu, utilisation: float, transformer_engine: bool = True
) -> list[StagePlan]:
    """Return the plans of all stages that need GPUs, in their order."""
    stages = []
    planned: PlannedRun | None = None
    for number, each in enumerate(rounds, 1):
        ending = f"-{number}" if len(rounds) > 1 else ""
        stages.append(_prune(f"prune{ending}", each, few, gpu.fp32_tflops * utilisation))
        planned = planned_run(each.run, ranks, transformer_engine)
        time = time_of(planned, gpu.bf16_tflops, utilisation)
        train = each.run.training
        needed = memory.fullest(planned).total
        tokens = count(train.steps * train.global_batch_size * each.run.data.sequence_length)
        about = f"to {count(num_parameters(planned.models.student))}; {train.steps:,} steps, {tokens} tokens"
        stages.append(StagePlan(f"distil{ending}", ranks, needed, time.training + time.evaluations, about))
    assert planned is not None, "there is a round"
    stages.append(_evaluate(planned, few, gpu.bf16_tflops * utilisation))
    return stages


def _prune(name: str, each: Round, ranks: int, tflops: float) -> StagePlan:
    """Return the plan of a cut: fp32 passes of the model, and of every candidate over the held-out samples."""
    cut, parallelism = each.cut, each.cut.parallelism or ParallelismConfig()
    run = _forward(each.model, parallelism, cut.sequence_length, ranks)
    again = each.model.num_layers if cut.layer_importance == "loss" else 0
    of_model = cut.samples + cut.held_out_samples * (1 + again)
    work = of_model * model_flops(run)
    for sizes in each.possible:
        work += cut.held_out_samples * model_flops(replace(run, models=Models(predicted(each.model, sizes), None)))
    pipeline = parallelism.pipeline_model_parallel_size
    num_bytes = max(_rank_bytes(run, rank) for rank in range(pipeline))
    seconds = work * cut.sequence_length / (tflops * 1e12 * ranks)
    compared = f"{len(each.possible)} candidates compared" if len(each.possible) > 1 else "sizes stated"
    about = f"fp32; of {count(num_parameters(each.model))}; {cut.samples:,} samples, {compared}"
    return StagePlan(name, ranks, num_bytes, seconds, about)


def _forward(model: Architecture, parallelism: ParallelismConfig, length: int, ranks: int) -> PlannedRun:
    """Return a run of a model alone in fp32, whose passes are planned as a student's."""
    training = TrainingConfig(micro_batch_size=MICRO_BATCH_SIZE, dtype="float32")
    config = RunConfig("", StudentConfig(), None, parallelism=parallelism, training=training)
    config.data.sequence_length = length
    return PlannedRun(config, Models(model, None), ranks)


def model_flops(run: PlannedRun) -> float:
    """Return the operations of a token's forward pass through the student, on all pipeline ranks together."""
    stages = range(run.config.parallelism.num_stages)
    return sum(sum(stage_flops(run, run.models.student, stage, True)[::2]) for stage in stages)


def _rank_bytes(run: PlannedRun, rank: int) -> float:
    """Return the bytes of weights, and of one layer's forward pass or the logits."""
    layers = set(rank_layers(run.models.student, run.config.parallelism, rank))
    logits = COPIES_OF_LOGITS * 4 * run.tokens * memory.columns(run) if run.is_last(rank) else 0
    workspace = max(logits, *(forward_workspace(run, run.models.student, layer) for layer in layers))
    return run.item * run.student(rank).total + workspace


def _evaluate(planned: PlannedRun, ranks: int, tflops: float) -> StagePlan:
    """Return the plan of evaluating both students against the teacher, which also runs twice."""
    train, length = planned.config.training, planned.config.data.sequence_length
    samples = train.eval_batches * train.global_batch_size
    config = replace(planned.config, parallelism=planned.config.parallelism.without_training())
    run = replace(planned, config=config, world_size=ranks)
    work = model_flops(run)
    if planned.models.teacher is not None:
        work += model_flops(replace(run, models=Models(planned.models.teacher, None)))
    pipeline = config.parallelism.pipeline_model_parallel_size
    weights = max(
        run.student(rank).total + run.teacher(rank).total - run.in_host_memory(rank) + 2 * run.staged_layer(rank)
        for rank in range(pipeline)
    )
    seconds = 2 * work * samples * length / (tflops * 1e12 * ranks)
    about = f"{samples:,} samples; memory of the weights alone"
    return StagePlan("evaluate", ranks, run.item * weights, seconds, about)


def _table(config: CompressConfig, stages: list[StagePlan], gpu: Gpu, utilisation: float) -> list[str]:
    layout = layout_text(config.parallelism) or "data parallel"
    rows = [
        f"{config.teacher} -> {config.output}/student on {gpu.name}; {layout}",
        f"{'stage':12}{'GPUs':>6}{'GB of ' + format(gpu.memory_gb, 'g'):>12}{'hours':>10}{'GPU-hours':>12}",
    ]
    for each in stages:
        numbers = f"{each.num_bytes / GB:12.1f}{each.seconds / 3600:10.2f}{each.gpu_hours:12.1f}"
        rows.append(f"{each.name:12}{each.ranks:6}{numbers}   {each.about}")
    rows.append(f"{'report':12}{1:6}{'':34}   minutes, on a CPU")
    hours, gpu_hours = sum(each.seconds for each in stages) / 3600, sum(each.gpu_hours for each in stages)
    rows.append(f"{'in all':12}{'':18}{hours:10.2f}{gpu_hours:12.1f}   at {utilisation:g} of the peak (utilisation=)")
    return [
        *rows,
        "not included: starting jobs, waiting in queues, reading and writing models, checks with transformers",
    ]
