"""Everything a run needs, as plain dataclasses of primitive fields, and the checks that span several of them.

No torch here: the command line reads these in the launcher, which must stay quick.
"""

import difflib
import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

DIVERGENCES = ("forward_kl",)
HIDDEN_LOSSES = ("cosine", "mse")
BALANCERS = ("static", "dynamic")
DTYPES = ("auto", "float32", "bfloat16")
DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")
AT_LEAST_ONE = (
    "parallelism.tensor_model_parallel_size",
    "parallelism.pipeline_model_parallel_size",
    "parallelism.context_parallel_size",
    "data.sequence_length",
    "training.steps",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.eval_interval",
    "training.eval_batches",
    "checkpoint.save_interval",
    "checkpoint.keep_last",
    "logging.log_interval",
)
POSITIVE = ("optimizer.lr", "optimizer.adam_eps", "distillation.temperature", "parallelism.timeout_minutes")
NOT_NEGATIVE = ("optimizer.min_lr", "optimizer.weight_decay", "optimizer.clip_grad", "data.num_workers")


@dataclass
class ModelConfig:
    """One decoder-only transformer. Fields left at None are read from `config.json` in `checkpoint`.

    `checkpoint` is a Hugging Face directory, a Megatron distributed checkpoint, a NeMo directory
    (`model_weights/` and `model_config.yaml`) or a checkpoint of ours; None means random weights.
    """

    checkpoint: str | None = None
    family: str | None = None  # llama | qwen2 | qwen3
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    rotary_base: float | None = None
    rope_scaling: dict[str, Any] | None = None  # config.json's rope_scaling, llama3 type only
    norm_epsilon: float | None = None
    tie_word_embeddings: bool | None = None
    block_configs: list[dict[str, Any]] | None = None  # layers that differ, as in Nemotron's config.json
    init_std: float = 0.02


@dataclass
class StudentConfig(ModelConfig):
    """The model that is trained."""


@dataclass
class TeacherConfig(ModelConfig):
    """The frozen model that is imitated. A class of its own, so that a config never shares it with the student."""


@dataclass
class DistillationConfig:
    """What the student learns from the teacher.

    With `balancer="static"` the loss is `lm_weight * lm + logits_weight * logits + hidden_weight * hidden`.
    With "dynamic" the distillation loss is scaled to `kd_loss_scale` times the size of the LM loss.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    scale_by_temperature_squared: bool = True
    hidden_loss: str | None = None  # cosine | mse
    hidden_layers: list[str] = field(default_factory=list)  # "student_layer:teacher_layer", e.g. "decoder.layers.3:..."
    balancer: str = "static"
    lm_weight: float = 0.0
    logits_weight: float = 1.0
    hidden_weight: float = 0.0
    kd_loss_scale: float = 1.0
    skip_lm_loss: bool = True  # dynamic balancer only: train on the distillation loss alone


@dataclass
class ParallelismConfig:
    """Megatron's parallel sizes; what is left of the world is data parallel."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    timeout_minutes: float = 10.0

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass
class DataConfig:
    """Token files made by `nemo distill prepare`.

    `train` and `valid` are prefixes of `.bin/.idx` pairs, or a blend: `["30", "a", "70", "b"]`.
    Without `valid`, `split` divides the documents of `train` (train, valid, test).
    """

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    split: str = "969,30,1"
    tokenizer: str | None = None  # a Hugging Face tokenizer directory; copied beside the exported student
    sequence_length: int = 4096
    cache: str | None = None  # index cache; default: beside the checkpoints
    num_workers: int = 0


@dataclass
class OptimizerConfig:
    """Adam with decoupled weight decay, and a warm-up then decay schedule. Steps are optimizer steps."""

    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 0
    decay_steps: int | None = None  # None: to the last step
    decay_style: str = "cosine"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = True


@dataclass
class TrainingConfig:
    """How long and in what pieces. A step is one global batch."""

    steps: int = 1000
    micro_batch_size: int = 1
    global_batch_size: int = 128
    eval_interval: int = 100
    eval_batches: int = 10  # global batches per evaluation
    seed: int = 1234
    data_seed: int | None = None  # None: seed
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on CPU
    stop_on_nan: bool = True


@dataclass
class CheckpointConfig:
    """Checkpoints under `<output_dir>/checkpoints/step_XXXXXXXX`; `latest` names the newest whole one."""

    save_interval: int = 1000
    keep_last: int = 2
    async_save: bool = False
    resume: bool = True
    export: bool = True  # write <output_dir>/student in Hugging Face format at the end


@dataclass
class LoggingConfig:
    """Metrics always go to `<output_dir>/metrics.jsonl`."""

    log_interval: int = 10
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclass
class RunConfig:
    """One whole run: what `python -m distill_nemo CONFIG.yaml` reads and what every run writes."""

    output_dir: str
    student: StudentConfig
    teacher: TeacherConfig | None = None  # None: plain training, without distillation
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro batches of one rank in one step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * data_parallel_size)


def check(config: RunConfig, world_size: int) -> None:
    """Refuse what cannot run, before anything is loaded or written.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    par, train, kd = config.parallelism, config.training, config.distillation
    _check_ranges(config)
    _require(
        world_size % par.model_parallel_size == 0,
        f"world size {world_size} is not divisible by tensor x pipeline x context parallel size = "
        f"{par.tensor_model_parallel_size} x {par.pipeline_model_parallel_size} x {par.context_parallel_size} = "
        f"{par.model_parallel_size}; change the number of processes or parallelism.*",
    )
    _require(
        par.context_parallel_size == 1
        and par.expert_model_parallel_size == 1
        and not par.virtual_pipeline_model_parallel_size,
        "parallelism: context, expert and virtual pipeline parallelism are not supported yet; leave them at 1 / null",
    )
    data_parallel_size = world_size // par.model_parallel_size
    batch = train.micro_batch_size * data_parallel_size
    _require(
        train.global_batch_size % batch == 0,
        f"training.global_batch_size {train.global_batch_size} is not divisible by micro_batch_size "
        f"{train.micro_batch_size} x data parallel size {data_parallel_size} = {batch}",
    )
    decay_steps = config.optimizer.decay_steps or train.steps
    _require(
        0 <= config.optimizer.warmup_steps < decay_steps,
        f"optimizer.warmup_steps must be below the {decay_steps} steps of the schedule, "
        f"got {config.optimizer.warmup_steps}",
    )
    _require(
        config.optimizer.min_lr <= config.optimizer.lr,
        f"optimizer.min_lr = {config.optimizer.min_lr} is above optimizer.lr = {config.optimizer.lr}",
    )
    _one_of("training.dtype", train.dtype, DTYPES)
    _one_of("optimizer.decay_style", config.optimizer.decay_style, DECAY_STYLES)
    _one_of("distillation.divergence", kd.divergence, DIVERGENCES)
    _one_of("distillation.balancer", kd.balancer, BALANCERS)
    if kd.hidden_loss is not None:
        _one_of("distillation.hidden_loss", kd.hidden_loss, HIDDEN_LOSSES)
    _require(
        (kd.hidden_loss is None) == (not kd.hidden_layers),
        "distillation.hidden_loss and distillation.hidden_layers go together: set both or neither",
    )
    _require(
        not par.sequence_parallel or par.tensor_model_parallel_size > 1,
        "parallelism.sequence_parallel needs parallelism.tensor_model_parallel_size > 1",
    )
    for pair in kd.hidden_layers:
        _require(pair.count(":") == 1, f'distillation.hidden_layers: "{pair}" is not "student_layer:teacher_layer"')
    _require(
        not par.sequence_parallel or config.data.sequence_length % par.tensor_model_parallel_size == 0,
        f"data.sequence_length = {config.data.sequence_length} is not divisible by "
        f"parallelism.tensor_model_parallel_size = {par.tensor_model_parallel_size}, as sequence_parallel needs",
    )
    _require(bool(config.data.train), "data.train is empty: name the token files made by `nemo distill prepare`")
    _check_model("student", config.student, par)
    if config.teacher is not None:
        _check_model("teacher", config.teacher, par)


def _check_ranges(config: RunConfig) -> None:
    for names, ok, allowed in (
        (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (POSITIVE, lambda value: 0 < value < math.inf, "positive"),
        (NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more"),
    ):
        for name in names:
            value = attrgetter(name)(config)
            _require(ok(value), f"{name} must be {allowed}, got {value}")


def _check_model(role: str, model: ModelConfig, par: ParallelismConfig) -> None:
    tensor, pipeline = par.tensor_model_parallel_size, par.pipeline_model_parallel_size
    by_tensor = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    for name, size in (*((name, tensor) for name in by_tensor), ("num_layers", pipeline)):
        value = getattr(model, name)
        kind = "pipeline" if name == "num_layers" else "tensor"
        if value is not None and value % size:
            raise ValueError(
                f"{role}.{name} = {value} is not divisible by parallelism.{kind}_model_parallel_size = {size}"
            )


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def near(word: str, allowed: typing.Iterable[str]) -> str:
    """A ' Did you mean ...?' for a word that is not allowed, or the list of what is."""
    allowed = list(allowed)
    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else f" Known: {', '.join(allowed)}."


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f'{name} = "{value}" is not known.{near(str(value), allowed)}')


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, every field present; the inverse of `from_dict`."""
    return asdict(config)


def from_dict(values: dict[str, Any], cls: type = RunConfig, where: str = "") -> Any:
    """Build a config from nested plain values, refusing unknown fields and wrong types by name."""
    _require(isinstance(values, dict), f"{where or 'config'} must be a mapping, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    for name in values:
        _require(name in known, f'unknown field "{where}{name}".{near(str(name), sorted(known))}')
    built = {name: _convert(value, hints[name], f"{where}{name}") for name, value in values.items()}
    try:
        return cls(**built)
    except TypeError as error:
        raise ValueError(f"{where or 'config'}: {error}") from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if is_dataclass(hint):
        return from_dict(value, typing.cast(type, hint), where + ".")
    plain = typing.get_origin(hint) or hint
    if plain is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            return float(value)
        except ValueError:
            pass
    ok = isinstance(value, plain) and not (plain is int and isinstance(value, bool))
    _require(ok, f"{where} must be {plain.__name__}, got {value!r}")
    if plain is list:
        item = typing.get_args(hint)[0]
        item = typing.get_origin(item) or item
        items = typing.cast(list[Any], value)
        _require(all(isinstance(x, item) for x in items), f"{where} must be a list of {item.__name__}, got {value!r}")
    return value


def save_yaml(config: RunConfig, path: Path) -> None:
    """Write the complete config, every field included."""
    import yaml

    text = "# python -m distill_nemo THIS_FILE runs exactly this, under torchrun or alone.\n"
    path.write_text(text + yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def load_yaml(path: Path) -> RunConfig:
    """Read what `save_yaml` wrote (safe loader: a file cannot execute code)."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such config file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    return from_dict(values)
