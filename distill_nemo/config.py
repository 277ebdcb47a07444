"""The config of a run, as plain dataclasses of primitive fields.

A choice is a `Literal`. `setting` gives a field its help and its range, which `--help` prints and `from_dict` checks.
Conditions on several fields are in `checks.py`. No torch: the launcher imports this file and must start quickly.
"""

import math
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distill_nemo.benchmark_config import BenchmarksConfig
from distill_nemo.fields import setting
from distill_nemo.push_config import PushConfig
from distill_nemo.quantization import ExportFormatName, QuantizationConfig
from distill_nemo.schedules import Schedule, parse_schedule

if typing.TYPE_CHECKING:
    DivergenceName = str
else:  # a file of losses/divergences is a choice, unless its name begins with _
    _FILES = (Path(__file__).parent / "losses" / "divergences").glob("[!_]*.py")
    DivergenceName = Literal[tuple(sorted(file.stem for file in _FILES))]

Codec = Literal["sampled", "top_k", "hidden"]


@dataclass
class ModelConfig:
    """One decoder-only transformer. Fields left at None are read from `config.json` in `checkpoint`.

    `checkpoint` is a Hugging Face directory, a Megatron distributed checkpoint, a NeMo directory
    (`model_weights/` and `model_config.yaml`), a checkpoint of an earlier run or a name on the Hugging Face Hub
    (`ORG/NAME`, `ORG/NAME@REVISION`); None means random weights.
    """

    checkpoint: str | None = None
    family: str | None = setting(None, "model_type of config.json, such as llama")
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = setting(None, at_least=1)
    kv_channels: int | None = None
    vocab_size: int | None = setting(None, "smaller than the checkpoint's: its last rows are left out")
    max_position_embeddings: int | None = None
    rotary_base: float | None = None
    rope_scaling: dict[str, Any] | None = setting(None, "config.json's rope_scaling")
    norm_epsilon: float | None = None
    tie_word_embeddings: bool | None = None
    block_configs: list[dict[str, Any]] | None = setting(None, "heterogeneous layers, as in Nemotron's config.json")
    num_experts: int | None = setting(None, "per layer; this and the next three for MoE models only")
    num_experts_per_tok: int | None = None
    moe_ffn_hidden_size: int | None = setting(None, "of one expert")
    norm_topk_prob: bool | None = setting(None, "normalise the weights of a token's experts to a sum of 1")
    family_fields: dict[str, Any] | None = setting(None, "fields of config.json that only the family has, by its names")
    init_std: float = setting(0.02, "standard deviation of random weights", at_least=0)


@dataclass
class StudentConfig(ModelConfig):
    """The model that is trained."""


@dataclass
class TeacherConfig(ModelConfig):  # a class of its own, so that Fiddle never shares one config between both models
    """The frozen model to imitate."""


@dataclass
class DistillationConfig:
    """Losses between student and teacher.

    With `balancer="static"` the loss is `lm_weight * lm + logits_weight * logits + hidden_weight * hidden`.
    With "dynamic" the distillation loss is scaled to `kd_loss_scale` times the size of the LM loss.
    """

    divergence: DivergenceName = "forward_kl"
    beta: float = setting(0.5, "jensen_shannon only: the teacher's share of the mixture", above=0, below=1)
    top_k: int | None = setting(
        None, "forward_kl only: the teacher's k most likely tokens, and one bucket for all others", at_least=1
    )
    temperature: float = setting(
        1.0, "divides both models' logits; beyond 100, fp32 rounding would hide the loss", above=0, at_most=100
    )
    scale_by_temperature_squared: bool = True
    hidden_loss: Literal["cosine", "mse"] | None = None
    hidden_layers: list[str] = setting(
        [], 'pairs STUDENT:TEACHER, such as "decoder.layers.3:decoder.layers.7"; also .mlp, .self_attention'
    )
    balancer: Literal["static", "dynamic"] = "static"
    lm_weight: float = setting(0.0, at_least=0)
    logits_weight: float = setting(1.0, at_least=0)
    hidden_weight: float = setting(0.0, at_least=0)
    kd_loss_scale: float = setting(1.0, "dynamic balancer only", at_least=0)
    skip_lm_loss: bool = setting(True, "dynamic balancer only: train on the distillation loss alone")
    schedules: dict[str, str] = setting(
        {}, """weights or temperature by step, such as '{"temperature": "cosine 0:4 2000:1"}'; also linear, constant"""
    )
    fused_linear: bool | None = setting(
        None, "compute the output layers within the loss, so that no whole logits exist; None: where possible"
    )
    offload_teacher: bool = setting(
        False, "keep the weights of the teacher's layers in host memory, and copy each to the GPU when it runs"
    )

    @property
    def uses_logits(self) -> bool:
        """True if the loss needs the teacher's logits."""
        return self.balancer == "dynamic" or self._ever("logits_weight")

    @property
    def uses_lm_loss(self) -> bool:
        """True if the student's LM loss is part of the total."""
        return not self.skip_lm_loss if self.balancer == "dynamic" else self._ever("lm_weight")

    @property
    def parsed_schedules(self) -> dict[str, Schedule]:
        """Schedules by field.

        Raises:
            ValueError: naming the schedule that is none.
        """
        return {name: parse_schedule(f'distillation.schedules["{name}"]', v) for name, v in self.schedules.items()}

    def at(self, step: int) -> "DistillationConfig":
        """Return the losses of a step, counted from 1, without schedules."""
        values = {name: schedule.at(step) for name, schedule in self.parsed_schedules.items()}
        return replace(self, schedules={}, **values)

    def _ever(self, weight: str) -> bool:
        """Return True if a weight is not 0 at every step."""
        schedule = self.parsed_schedules.get(weight)
        return any(value for _, value in schedule.points) if schedule else getattr(self, weight) != 0


@dataclass
class ParallelismConfig:
    """Megatron's parallel sizes. The data-parallel size is the number of ranks over their product."""

    tensor_model_parallel_size: int = setting(1, at_least=1)
    pipeline_model_parallel_size: int = setting(1, at_least=1)
    virtual_pipeline_model_parallel_size: int | None = setting(None, "model chunks per pipeline stage", at_least=2)
    context_parallel_size: int = setting(1, at_least=1)
    expert_model_parallel_size: int = setting(1, at_least=1)
    sequence_parallel: bool = False
    timeout_minutes: float = setting(10.0, "timeout of collectives", above=0, at_most=10**6)

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def num_stages(self) -> int:
        """Number of pieces that the layers are divided into."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def on(self, world_size: int) -> "ParallelismConfig":
        """Return the layout on other ranks: sizes that divide both, no virtual pipeline, no context parallelism."""
        tensor = math.gcd(self.tensor_model_parallel_size, world_size)
        pipeline = math.gcd(self.pipeline_model_parallel_size, world_size // tensor)
        return ParallelismConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            expert_model_parallel_size=math.gcd(self.expert_model_parallel_size, world_size // (tensor * pipeline)),
            sequence_parallel=self.sequence_parallel and tensor > 1,
            timeout_minutes=self.timeout_minutes,
        )

    def without_training(self) -> "ParallelismConfig":
        """Return the layout for ranks that only run models forward, on whole sequences."""
        return replace(self, context_parallel_size=1, virtual_pipeline_model_parallel_size=None)

    def stage_sizes(self, num_layers: int) -> list[int]:
        """Return the number of layers of each stage; the first stages take the remainder."""
        size, more = divmod(num_layers, self.num_stages)
        return [size + (stage < more) for stage in range(self.num_stages)]


def _prefixes(blend: list[str]) -> list[str]:
    """Return the blend without `.bin` or `.idx` at the end of a path. `from_dict` has refused other types."""
    if not isinstance(blend, list):
        return blend
    return [v.removesuffix(".bin").removesuffix(".idx") if isinstance(v, str) else v for v in blend]


@dataclass
class DataConfig:
    """Token files made by `nemo distill prepare`.

    `train` and `valid` are prefixes of `.bin/.idx` pairs, directories of teacher stores, or a blend:
    `["30", "a", "70", "b"]`.
    Without `valid`, `split` divides the documents of `train` (train, valid, test).
    """

    train: list[str] = setting([])
    valid: list[str] = setting([])
    split: str = "969,30,1"
    tokenizer: str | None = setting(None, "a Hugging Face tokenizer directory; copied beside the exported student")
    sequence_length: int = setting(4096, at_least=1)
    loss_on: Literal["assistant", "last", "all"] | None = setting(
        None, "tokens of conversations that count; None: as prepared; last: the assistant's last turn"
    )
    reset_at_documents: bool = setting(False, "no attention across documents; positions restart in each")
    cache: str | None = setting(None, "index cache; default: beside the checkpoints")
    num_workers: int = setting(0, at_least=0)

    def __post_init__(self) -> None:
        """Take the name of either file for their common prefix."""
        self.train, self.valid = _prefixes(self.train), _prefixes(self.valid)


@dataclass
class OptimizerConfig:
    """Adam with decoupled weight decay; warm-up, then decay of the learning rate. Steps are optimizer steps."""

    lr: float = setting(1e-4, above=0)
    min_lr: float = setting(1e-5, at_least=0)
    warmup_steps: int = setting(0, at_least=0)
    decay_steps: int | None = setting(None, "None: to the last step", at_least=1)
    decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "cosine"
    weight_decay: float = setting(0.1, at_least=0)
    adam_beta1: float = setting(0.9, at_least=0, below=1)
    adam_beta2: float = setting(0.95, at_least=0, below=1)
    adam_eps: float = setting(1e-8, above=0)
    clip_grad: float = setting(1.0, at_least=0)
    use_distributed_optimizer: bool = True


@dataclass
class TrainingConfig:
    """Length of the run and the size of its batches. A step is one global batch."""

    steps: int = setting(1000, at_least=1)
    micro_batch_size: int = setting(1, at_least=1)
    global_batch_size: int = setting(128, at_least=1)
    eval_interval: int = setting(100, at_least=1)
    eval_batches: int = setting(10, "global batches per evaluation", at_least=1)
    benchmark_interval: int | None = setting(
        None,
        "steps to save for benchmarks.tasks, or `nemo distill evaluate steps_of=`; each stays until it is measured",
        at_least=1,
    )
    seed: int = setting(1234, at_least=0, below=2**31)
    data_seed: int | None = setting(None, "None: seed", at_least=0, below=2**31)
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on CUDA, float32 on CPU")
    recompute: Literal["full", "selective"] | None = setting(None, "recompute activations in backward, to save memory")
    on_nan: Literal["stop", "skip"] = setting(
        "stop", "for a loss or gradient that is not finite; skip: leave out the step's update"
    )


@dataclass
class CheckpointConfig(PushConfig):
    """Checkpoints under `<output_dir>/checkpoints/step_XXXXXXXX`; `latest` names the newest whole one."""

    save_interval: int = setting(1000, at_least=1)
    keep_last: int = setting(2, at_least=1)
    async_save: bool = False
    resume: bool = True
    export: bool = setting(True, "write <output_dir>/student in Hugging Face format at the end")
    copy_untouched: bool = setting(
        False, "also export the source's tensors that the student lacks, such as a vision tower"
    )
    quantized: ExportFormatName = setting(
        "modelopt", "format of a quantised student's export; none: its rounded weights, in the dtype of the training"
    )


@dataclass
class LoggingConfig:
    """Metrics always go to `<output_dir>/metrics.jsonl`."""

    log_interval: int = setting(10, at_least=1)
    tensorboard: bool = True
    wandb_project: str | None = None
    mlflow_experiment: str | None = setting(None, "on the server of MLFLOW_TRACKING_URI; needs distill-nemo[mlflow]")


@dataclass
class RunConfig:
    """A whole run, as `python -m distill_nemo CONFIG.yaml` reads it and every run writes it.

    Its fields are the sections of a recipe, and are listed nowhere else.
    """

    output_dir: str = field(metadata={"help": "directory for everything that the run writes"})
    student: StudentConfig
    teacher: TeacherConfig | None = None  # None: plain training, without distillation
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    benchmarks: BenchmarksConfig = field(default_factory=BenchmarksConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Return the number of micro batches of one rank in one step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * data_parallel_size)


@dataclass
class ExportConfig(PushConfig):
    """An export of a checkpoint by ranks of its own, as `nemo distill export` launches it."""

    checkpoint: str
    output: str
    tokenizer: str | None = None
    copy_untouched: bool = False
    quantized: ExportFormatName = "modelopt"
    parallelism: ParallelismConfig | None = None  # None: that of the run, on the ranks that there are


@dataclass(kw_only=True)
class CutConfig:
    """Sizes to cut a model to, or a target for them, and the samples that decide."""

    num_layers: int | None = setting(None, "layers that stay, with the highest importance")
    hidden_size: int | None = setting(None, "width of the residual stream")
    ffn_hidden_size: int | None = setting(None, "width of the MLPs")
    num_attention_heads: int | None = setting(None, "heads stay in their group, so each group keeps equally many")
    num_query_groups: int | None = setting(
        None, "groups of heads that share a key and a value; without num_attention_heads, they keep all their heads"
    )
    num_experts: int | None = setting(None, "experts of a layer")
    moe_ffn_hidden_size: int | None = setting(None, "width of one expert")
    mamba_num_heads: int | None = setting(None, "heads stay in their group, so each group keeps equally many")
    target_params: float | None = setting(None, "largest number of parameters, such as 6e9", above=0)
    target_memory: float | None = setting(
        None, "instead of target_params: the share of a GPU's memory that the weights may take", above=0, at_most=1
    )
    target_gpu: str | None = setting(None, "the GPU of target_memory: a100-80gb, h100, h200 or b200")
    target_dtype: Literal["bf16", "fp8", "fp4"] = setting("bf16", "the weights' type in target_memory")
    samples: int = setting(256, "sequences to score with", at_least=1)
    held_out_samples: int = setting(32, "the sequences after them, for losses", at_least=1)
    layer_importance: Literal["cosine", "loss"] = setting(
        "cosine",
        "cosine: 1 - cosine of a layer's input and output; loss: the rise of the held-out loss without the layer, at a "
        "pass over the held-out samples per layer",
    )


@dataclass
class PruneConfig(CutConfig):
    """A model cut to smaller sizes by ranks of its own, as `nemo distill prune` launches it."""

    model: str = field(metadata={"help": "Hugging Face directory to cut"})
    output: str = field(metadata={"help": "directory to write"})
    data: str = field(metadata={"help": "prefix of .bin/.idx files of the text to score with"})
    split: str = setting("1", "weights of train, valid, test: only the first share of the documents is read")
    sequence_length: int = setting(1024, "tokens of a sequence; packs keep their own length", at_least=2)
    parallelism: ParallelismConfig | None = None  # None: data parallel, on the ranks that there are

    def __post_init__(self) -> None:
        """Take the name of either file for their common prefix."""
        (self.data,) = _prefixes([self.data])


@dataclass
class CorpusConfig(DataConfig):
    """All of `train` is written, unless `split` leaves documents out."""

    split: str = setting("1", "weights of train, valid, test: only the first share of the documents is written")


@dataclass
class StoreConfig:
    """The writing of a teacher's targets into a store, as `nemo distill teacher` launches it."""

    output: str = field(metadata={"help": "directory of the store"})
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: CorpusConfig = field(default_factory=CorpusConfig)
    codec: Codec = setting(
        "sampled", "sampled: draws, unbiased; top_k: the most likely ids and the rest's mass; hidden: exact, large"
    )
    draws: int = setting(50, "codec=sampled: draws for each token", at_least=1, at_most=1023)
    top_k: int = setting(50, "codec=top_k: most likely ids of each token", at_least=1, at_most=1024)
    temperature: float = setting(
        1.0, "divides the teacher's logits; runs need the same distillation.temperature", above=0, at_most=100
    )
    windows: int | None = setting(None, "samples to write; None: one pass over data.train", at_least=1, at_most=2**40)
    shard_windows: int | None = setting(
        None,
        "samples of a file, which a replica writes at a time; None: 262,144 tokens, more beyond 10^9, to some 256 MiB",
        at_least=1,
        at_most=2**32,
    )
    micro_batch_size: int = setting(1, at_least=1)
    seed: int = setting(1234, "order of the samples, and draws", at_least=0, below=2**31)
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on CUDA, float32 on CPU")
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
