"""Everything a run needs, as plain dataclasses of primitive fields; what spans several of them is in `checks.py`.

No torch here: the command line reads these in the launcher, which must stay quick.
"""

import difflib
import reprlib
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any


@dataclass
class ModelConfig:
    """One decoder-only transformer. Fields left at None are read from `config.json` in `checkpoint`.

    `checkpoint` is a Hugging Face directory, a Megatron distributed checkpoint, a NeMo directory
    (`model_weights/` and `model_config.yaml`) or a checkpoint of ours; None means random weights.
    """

    checkpoint: str | None = None
    family: str | None = None  # llama | qwen2 | qwen3 | qwen3_moe
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    vocab_size: int | None = None  # fewer than the checkpoint has leaves its last rows out
    max_position_embeddings: int | None = None
    rotary_base: float | None = None
    rope_scaling: dict[str, Any] | None = None  # config.json's rope_scaling, llama3 type only
    norm_epsilon: float | None = None
    tie_word_embeddings: bool | None = None
    block_configs: list[dict[str, Any]] | None = None  # layers that differ, as in Nemotron's config.json
    num_experts: int | None = None  # of every layer; this and the next three for mixtures of experts only
    num_experts_per_tok: int | None = None
    moe_ffn_hidden_size: int | None = None  # of one expert
    norm_topk_prob: bool | None = None  # the weights of a token's experts sum to 1
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

    divergence: str = "forward_kl"  # forward_kl | reverse_kl | jensen_shannon
    beta: float = 0.5  # jensen_shannon only: the teacher's share of the mixture
    top_k: int | None = None  # forward_kl only: the teacher's k most likely tokens, and one bucket for all others
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
    fused_linear: bool | None = None  # output layers as part of the loss, logits never whole; None: where possible
    offload_teacher: bool = False  # its layers' weights stay in host memory; each is copied to the GPU for its turn


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

    @property
    def num_stages(self) -> int:
        """Pieces that the layers are divided into."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def stage_sizes(self, num_layers: int) -> list[int]:
        """Layers of every stage, in the order of the model; the first ones take what does not divide."""
        size, more = divmod(num_layers, self.num_stages)
        return [size + (stage < more) for stage in range(self.num_stages)]


def _prefixes(blend: list[str]) -> list[str]:
    """Return the blend without `.bin` or `.idx` at the end of a path; `from_dict` refuses what is no list of paths."""
    if not isinstance(blend, list):
        return blend
    return [v.removesuffix(".bin").removesuffix(".idx") if isinstance(v, str) else v for v in blend]


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

    def __post_init__(self) -> None:
        """Take the name of either file for their common prefix."""
        self.train, self.valid = _prefixes(self.train), _prefixes(self.valid)


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
    recompute: str | None = None  # full | selective: compute activations again in backward, to save memory
    on_nan: str = "stop"  # stop | skip: leave out the update of a step whose loss or gradient is not finite


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


def require(ok: bool, message: str) -> None:
    """Raise `ValueError(message)` unless ok."""
    if not ok:
        raise ValueError(message)


def near(word: str, allowed: typing.Iterable[str]) -> str:
    """A ' Did you mean ...?' for a word that is not allowed, or the list of what is."""
    allowed = list(allowed)
    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else f" Known: {', '.join(allowed)}."


def first_few(words: list[str], most: int) -> list[str]:
    """The first `most` of them and, where there are more, how many."""
    return words[:most] + ([f"and {len(words) - most} more"] if len(words) > most else [])


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, every field present; the inverse of `from_dict`."""
    return asdict(config)


def from_dict(values: dict[str, Any], cls: type = RunConfig, where: str = "") -> Any:
    """Build a config from nested plain values, refusing unknown fields and wrong types by name."""
    name_of_it = where.rstrip(".") or "config"
    require(isinstance(values, dict), f"{name_of_it} must be a mapping of fields, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    for name in values:
        require(name in known, f'unknown field "{where}{name}".{near(str(name), sorted(known))}')
    built = {name: _convert(value, hints[name], f"{where}{name}") for name, value in values.items()}
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    require(not missing, f"{name_of_it} leaves out {', '.join(missing)}, which must be set")
    return cls(**built)


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
        except (ValueError, OverflowError):
            pass
    ok = isinstance(value, plain) and not (plain is int and isinstance(value, bool))
    require(ok, f"{where} must be {plain.__name__}, got {reprlib.repr(value)}")
    if plain is list:
        item = typing.get_args(hint)[0]
        item = typing.get_origin(item) or item
        items = typing.cast(list[Any], value)
        require(
            all(isinstance(x, item) for x in items),
            f"{where} must be a list of {item.__name__}, got {reprlib.repr(value)}",
        )
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
