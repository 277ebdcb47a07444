"""Checks of several fields of a config, before anything is loaded or written. No torch: the launcher checks too.

`config_files.from_dict` has already checked each field by itself.
"""

from dataclasses import fields

from distill_nemo.config import (
    DistillationConfig,
    ExportConfig,
    ModelConfig,
    ParallelismConfig,
    PruneConfig,
    RunConfig,
    StoreConfig,
)
from distill_nemo.fields import checked, require, suggest
from distill_nemo.job_config import EvaluateConfig, JobConfig, words_of
from distill_nemo.quantization import check_quantization

FIELDS_OF_BALANCERS = {
    "static": ("lm_weight", "logits_weight", "hidden_weight"),
    "dynamic": ("kd_loss_scale", "skip_lm_loss"),
}

SCHEDULED = ("lm_weight", "logits_weight", "hidden_weight", "kd_loss_scale", "temperature")

PRUNED_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("num_experts", "moe_ffn_hidden_size", "mamba_num_heads"),
)


def check(config: RunConfig, world_size: int) -> None:
    """Refuse a config that cannot run on `world_size` ranks.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    num_microbatches = _check_sizes(config, world_size)
    _check_parallelism(config, num_microbatches)
    _check_training(config)
    _check_distillation(config.distillation)
    check_quantization(config.quantization)
    config.benchmarks.check(config.training.benchmark_interval)
    saved, numbers = config.checkpoint, config.quantization
    require(
        numbers.format != "none" or numbers.kv_cache == "none" or not saved.export,
        f'quantization.kv_cache = "{numbers.kv_cache}" without quantization.format cannot be exported: set that, or '
        "checkpoint.export=false",
    )
    require(saved.export or not saved.copy_untouched, "checkpoint.copy_untouched needs checkpoint.export; set both")
    pushed = saved.destination() is not None
    require(saved.export or not pushed, "checkpoint.push_to needs checkpoint.export; set both")
    require(bool(config.data.train), "data.train is empty: name the token files made by `nemo distill prepare`")
    _check_model("student", config.student, config.parallelism)
    if config.teacher is not None:
        _check_model("teacher", config.teacher, config.parallelism)


def check_job(config: JobConfig, world_size: int) -> None:
    """Refuse a job that cannot run on `world_size` ranks.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    if isinstance(config, RunConfig):
        check(config, world_size)
    elif isinstance(config, PruneConfig):
        check_prune(config, world_size)
    elif isinstance(config, StoreConfig):
        _check_store(config, world_size)
    elif isinstance(config, EvaluateConfig):
        check_evaluate(config, world_size)
    elif config.parallelism is not None:
        check_layout_without_training(config.parallelism, world_size)
    if isinstance(config, ExportConfig):
        config.destination()


def _check_store(config: StoreConfig, world_size: int) -> None:
    par, data = config.parallelism, config.data
    check_layout_without_training(par, world_size)
    _check_has_experts(par, [config.teacher])
    _check_length(par, data.sequence_length)
    require(
        config.teacher.checkpoint is not None,
        "teacher.checkpoint is not set: a teacher of random weights teaches nothing; name one",
    )
    require(bool(data.train), "data.train is empty: name the token files made by `nemo distill prepare`")
    for name in ("valid", "num_workers"):
        value = getattr(data, name)
        require(not value, f"data.{name} = {value} has a use in training only; leave it out")
    for name, codec in (("draws", "sampled"), ("top_k", "top_k")):
        value = getattr(config, name)
        require(
            config.codec == codec or value == getattr(StoreConfig, name),
            f"{name} = {value} needs codec={codec}, not {config.codec}; leave it out",
        )
    require(
        config.codec != "hidden" or config.temperature == 1,
        f"temperature = {config.temperature}: codec=hidden serves every temperature; leave it out",
    )
    _check_model("teacher", config.teacher, par)


def check_evaluate(config: EvaluateConfig, world_size: int) -> None:
    """Refuse an evaluation that measures nothing, has no place for its results, or does not fit the ranks.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    has_tasks = bool(words_of(config.tasks))
    require(
        has_tasks or bool(config.domains),
        "nothing says what to measure: name held-out token files with data=, benchmarks with tasks=, or both",
    )
    require(
        (config.model is None) != (config.steps_of is None),
        "name one of these: a model with model=, or with steps_of= the output_dir of a run",
    )
    for name in ("until_step", "wait_minutes"):
        value = vars(config)[name]
        require(
            config.steps_of is not None or value == getattr(EvaluateConfig, name),
            f"{name} = {value} needs steps_of=, the output_dir of a run; leave it out",
        )
    if config.steps_of is not None:
        for name in ("data", "output"):
            require(
                not vars(config)[name],
                f"steps_of measures by tasks, in {config.steps_of}/benchmarks; leave {name}= out",
            )
    require(
        not has_tasks or bool(config.output or config.steps_of),
        "tasks needs output=, a directory for the results, from which the same command goes on after an interruption",
    )
    require(
        not config.domains or bool(config.output) or world_size == 1,
        "data on several ranks needs output=, a directory for an index that all ranks see",
    )
    check_layout_without_training(config.parallelism or ParallelismConfig(), world_size)


def check_layout_without_training(parallelism: ParallelismConfig, world_size: int) -> None:
    """Refuse a layout that does not fit `world_size` ranks, or has parts that only training uses.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    _check_ranks(parallelism, world_size)
    _check_sequence_parallelism(parallelism)
    virtual = parallelism.virtual_pipeline_model_parallel_size
    require(
        virtual is None,
        f"parallelism.virtual_pipeline_model_parallel_size = {virtual} has a use in training only; leave it out",
    )


def check_prune(config: PruneConfig, world_size: int) -> None:
    """Refuse a config that names no result or too many, and a layout that does not fit `world_size` ranks.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    par = config.parallelism or ParallelismConfig()
    check_layout_without_training(par, world_size)
    stated = {name for name, value in vars(config).items() if value is not None}
    targets = [name for name in ("target_params", "target_memory") if name in stated]
    require(
        bool(targets) or not stated.isdisjoint(PRUNED_SIZES),
        f"nothing says how small the model becomes: state some of {', '.join(PRUNED_SIZES)}, or target_params, or "
        "target_memory with target_gpu",
    )
    require(len(targets) < 2, "target_params and target_memory: state one of them")
    require(
        ("target_gpu" in stated) == ("target_memory" in stated),
        "target_memory, the share of a GPU's memory that the weights may take, and target_gpu need each other",
    )
    require(
        "target_memory" in stated or config.target_dtype == PruneConfig.target_dtype,
        f"target_dtype = {config.target_dtype} is the weights' type in target_memory, which is not set; leave it out",
    )
    context, ranks = par.context_parallel_size, world_size // par.model_parallel_size
    require(context == 1, f"parallelism.context_parallel_size = {context}: samples are scored whole; set it to 1")
    for name in ("samples", "held_out_samples"):
        count = vars(config)[name]
        require(count % ranks == 0, f"{name} = {count} is not divisible by the {ranks} data-parallel ranks")


def _check_sizes(config: RunConfig, world_size: int) -> int:
    """Return the number of micro batches of a step. Refuse ranks and batch sizes that do not divide."""
    par, train = config.parallelism, config.training
    _check_ranks(par, world_size)
    _check_has_experts(par, [model for model in (config.student, config.teacher) if model is not None])
    data_parallel_size = world_size // par.model_parallel_size
    batch = train.micro_batch_size * data_parallel_size
    require(
        train.global_batch_size % batch == 0,
        f"training.global_batch_size {train.global_batch_size} is not divisible by micro_batch_size "
        f"{train.micro_batch_size} x data parallel size {data_parallel_size} = {batch}",
    )
    return config.num_microbatches(data_parallel_size)


def _check_training(config: RunConfig) -> None:
    train, optimizer = config.training, config.optimizer
    decay_steps = optimizer.decay_steps or train.steps
    require(
        optimizer.warmup_steps < decay_steps,
        f"optimizer.warmup_steps must be below the {decay_steps} steps of the schedule, got {optimizer.warmup_steps}",
    )
    require(
        optimizer.min_lr <= optimizer.lr,
        f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}",
    )


def _check_parallelism(config: RunConfig, num_microbatches: int) -> None:
    par = config.parallelism
    _check_sequence_parallelism(par)
    _check_length(par, config.data.sequence_length)
    pipeline, virtual = par.pipeline_model_parallel_size, par.virtual_pipeline_model_parallel_size
    if virtual is None:
        return
    require(
        pipeline > 1,
        f"parallelism.virtual_pipeline_model_parallel_size = {virtual} divides pipeline stages, and needs "
        f"parallelism.pipeline_model_parallel_size > 1, got {pipeline}",
    )
    require(
        num_microbatches % pipeline == 0,
        f"a virtual pipeline needs micro batches in multiples of pipeline_model_parallel_size = {pipeline}, "
        f"got {num_microbatches}: change training.global_batch_size or micro_batch_size",
    )


def _check_length(par: ParallelismConfig, length: int) -> None:
    context = par.context_parallel_size
    pieces = context * 2 if context > 1 else 1  # each context-parallel rank has an early and a late piece
    pieces *= par.tensor_model_parallel_size if par.sequence_parallel else 1
    require(
        length % pieces == 0,
        f"data.sequence_length = {length} is not divisible by {pieces}, as parallelism.context_parallel_size = "
        f"{context} and sequence_parallel = {par.sequence_parallel} need",
    )


def _check_sequence_parallelism(par: ParallelismConfig) -> None:
    require(
        not par.sequence_parallel or par.tensor_model_parallel_size > 1,
        "parallelism.sequence_parallel needs parallelism.tensor_model_parallel_size > 1",
    )


def _check_ranks(par: ParallelismConfig, world_size: int) -> None:
    """Refuse a number of ranks that the layout does not divide."""
    require(
        world_size % par.model_parallel_size == 0,
        f"world size {world_size} is not divisible by tensor x pipeline x context parallel size = "
        f"{par.tensor_model_parallel_size} x {par.pipeline_model_parallel_size} x {par.context_parallel_size} = "
        f"{par.model_parallel_size}; change the number of processes or parallelism.*",
    )
    peers = world_size // (par.tensor_model_parallel_size * par.pipeline_model_parallel_size)
    require(
        peers % par.expert_model_parallel_size == 0,
        f"parallelism.expert_model_parallel_size = {par.expert_model_parallel_size} does not divide {peers}: "
        f"world size {world_size} / (tensor x pipeline parallel size = {par.tensor_model_parallel_size} x "
        f"{par.pipeline_model_parallel_size}), the data and context parallel ranks that experts are spread over",
    )


def _check_has_experts(par: ParallelismConfig, models: list[ModelConfig]) -> None:
    """Refuse expert parallelism without experts."""
    if par.expert_model_parallel_size == 1:
        return
    require(
        any(model.num_experts is not None or _unread(model) for model in models),
        f"parallelism.expert_model_parallel_size = {par.expert_model_parallel_size} needs a student or a teacher with "
        "experts (num_experts); set it to 1",
    )


def _unread(model: ModelConfig) -> bool:
    """Return True if unset fields are still to be read from the checkpoint."""
    return model.checkpoint is not None and model.family is None


def _check_balancer(kd: DistillationConfig) -> None:
    """Refuse fields of the other balancer, which would be ignored silently."""
    for balancer, names in FIELDS_OF_BALANCERS.items():
        changed = {name: getattr(kd, name) for name in names if getattr(kd, name) != getattr(DistillationConfig, name)}
        changed |= {f"the schedule of {name}": text for name, text in kd.schedules.items() if name in names}
        given = ", ".join(f"{name} = {value}" for name, value in changed.items())
        require(
            kd.balancer == balancer or not changed,
            f'distillation.balancer = "{kd.balancer}" ignores {given}: leave that out, or set balancer to "{balancer}"',
        )

    scale = kd.schedules.get("kd_loss_scale", kd.kd_loss_scale)
    require(
        kd.balancer != "dynamic" or not kd.skip_lm_loss or scale == DistillationConfig.kd_loss_scale,
        f"distillation.kd_loss_scale = {scale} weighs the loss beside the LM loss, which "
        "distillation.skip_lm_loss leaves out: leave that out, or set skip_lm_loss to false",
    )


def _check_distillation(kd: DistillationConfig) -> None:
    _check_schedules(kd)
    _check_balancer(kd)
    _check_hidden(kd)
    require(
        kd.divergence == "jensen_shannon" or kd.beta == DistillationConfig.beta,
        f'distillation.beta = {kd.beta} needs divergence = "jensen_shannon", not "{kd.divergence}"',
    )
    require(
        kd.top_k is None or kd.divergence == "forward_kl",
        f'distillation.top_k needs divergence = "forward_kl", not "{kd.divergence}"',
    )
    require(
        not kd.fused_linear or kd.uses_logits,
        "distillation.fused_linear = true needs a logits loss, but distillation.logits_weight = 0; leave it unset",
    )
    for step in sorted({1, *(step for each in kd.parsed_schedules.values() for step, _ in each.points if step)}):
        now = kd.at(step)
        require(
            kd.balancer != "static" or any((now.lm_weight, now.logits_weight, now.hidden_weight)),
            "distillation.lm_weight, logits_weight and hidden_weight are all 0"
            f"{f' at step {step}' if kd.schedules else ''}: there is nothing to learn; set one above 0",
        )


def _check_schedules(kd: DistillationConfig) -> None:
    """Refuse a schedule that is none, of another field, outside the field's range, or beside a value of it."""
    known = {each.name: each for each in fields(DistillationConfig) if each.name in SCHEDULED}
    for name in kd.schedules:
        require(name in SCHEDULED, f'distillation.schedules has "{name}".{suggest(name, SCHEDULED)}')
    for name, schedule in kd.parsed_schedules.items():
        for step, value in schedule.points:
            checked(f'distillation.schedules["{name}"] at step {step}', value, float, known[name].metadata)
        value = getattr(kd, name)
        require(
            value == known[name].default,
            f"distillation.{name} = {value} is beside its schedule, which gives it for every step; leave one out",
        )


def _check_hidden(kd: DistillationConfig) -> None:
    require(
        (kd.hidden_loss is None) == (not kd.hidden_layers),
        "distillation.hidden_loss and distillation.hidden_layers go together: set both or neither",
    )
    require(
        not (kd.hidden_weight or "hidden_weight" in kd.schedules) or bool(kd.hidden_layers),
        f"distillation.hidden_weight = {kd.schedules.get('hidden_weight', kd.hidden_weight)} needs hidden_loss and "
        "hidden_layers",
    )
    for pair in kd.hidden_layers:
        require(pair.count(":") == 1, f'distillation.hidden_layers: "{pair}" is not "student_layer:teacher_layer"')


def _check_model(role: str, model: ModelConfig, par: ParallelismConfig) -> None:
    size, stages = par.tensor_model_parallel_size, par.num_stages
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads is not None and groups is not None and heads % groups:
        raise ValueError(f"{role}.num_attention_heads = {heads} is not divisible by {role}.num_query_groups = {groups}")
    ffn = "ffn_hidden_size" if model.num_experts is None else "moe_ffn_hidden_size"
    for name in ("num_attention_heads", ffn):
        value = getattr(model, name)
        if value is not None and value % size:
            raise ValueError(
                f"{role}.{name} = {value} is not divisible by parallelism.tensor_model_parallel_size = {size}"
            )
    if groups is not None and groups % size and size % groups:
        raise ValueError(
            f"{role}.num_query_groups = {groups} is neither a multiple nor a divisor of "
            f"parallelism.tensor_model_parallel_size = {size}"
        )
    if model.num_experts is not None and model.num_experts % par.expert_model_parallel_size:
        raise ValueError(
            f"{role}.num_experts = {model.num_experts} is not divisible by "
            f"parallelism.expert_model_parallel_size = {par.expert_model_parallel_size}"
        )
    if role == "student" and model.num_experts is not None and size > 1 and not par.sequence_parallel:
        raise ValueError(
            f"a student with experts (student.num_experts = {model.num_experts}) trains under "
            f"parallelism.tensor_model_parallel_size = {size} with parallelism.sequence_parallel=true only: "
            "without it, every rank would send the same tokens to the experts"
        )
    if model.num_layers is not None and model.num_layers < stages:
        raise ValueError(f"{role}.num_layers = {model.num_layers} cannot fill {stages} pipeline stages (parallelism.*)")
