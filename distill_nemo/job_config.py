"""Configs of a verification and of an evaluation, and the union of all jobs that executors launch. No torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distill_nemo.benchmark_config import TasksConfig
from distill_nemo.config import (
    ExportConfig,
    ParallelismConfig,
    PruneConfig,
    RunConfig,
    StoreConfig,
    TeacherConfig,
)
from distill_nemo.fields import setting


@dataclass
class VerifyConfig:
    """The verification of a store, as `nemo distill teacher verify` launches it."""

    store: str = field(metadata={"help": "directory of the store"})
    samples: int = setting(64, "windows for which the teacher is run again; 0: checksums only", at_least=0)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    micro_batch_size: int = setting(1, at_least=1)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)


@dataclass
class EvaluateConfig(TasksConfig):
    """The evaluation of models by held-out data and benchmarks, as `nemo distill evaluate` launches it."""

    model: str | None = setting(None, "checkpoint of any kind that `train` reads, or its name on the Hugging Face Hub")
    baseline: str | None = setting(None, "a second model, measured in the same way")
    teacher: str | None = setting(None, "a third one, with which the others are compared on `data`")
    data: str | None = setting(None, "prefixes of held-out .bin/.idx files, separated by commas; each is a domain")
    sequence_length: int = setting(1024, "tokens of a sample of `data`", at_least=1)
    samples: int = setting(64, "samples of each domain; more than it holds repeats it", at_least=1)
    vocab_size: int | None = setting(None, "ids that the models keep on `data`, if checkpoints have more", at_least=1)
    output: str | None = setting(None, "directory of the benchmarks' results, from which the same command goes on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the weights in benchmarks; auto: as config.json says"
    )
    parallelize: bool = setting(False, "one process spreads a large model over its GPUs in benchmarks")
    tokenizer: str | None = setting(None, "a Hugging Face tokenizer directory, for models that have none")
    steps_of: str | None = setting(
        None, "in place of a model, output_dir of a run, whose steps are measured as they are saved, until it ends"
    )
    until_step: int | None = setting(
        None, "the last step of steps_of; None: of the run, by its config.yaml", at_least=1
    )
    parallelism: ParallelismConfig | None = None  # None: data parallel, on the ranks that there are

    @property
    def domains(self) -> dict[str, str]:
        """Prefixes of `data` by name, named as shortly as they stay apart."""
        prefixes = words_of(self.data)
        short = [Path(prefix).name for prefix in prefixes]
        return dict(zip(short if len(set(short)) == len(short) else prefixes, prefixes, strict=True))

    @property
    def models(self) -> dict[str, str]:
        """Checkpoint directories by role."""
        named = {"model": self.model, "baseline": self.baseline, "teacher": self.teacher}
        return {role: path for role, path in named.items() if path is not None}


def words_of(text: str | None) -> list[str]:
    """Return what stands between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))


JobConfig = RunConfig | ExportConfig | PruneConfig | StoreConfig | VerifyConfig | EvaluateConfig
