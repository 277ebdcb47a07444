"""The config of an evaluation, and the union of the configs of jobs that executors launch. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill_nemo.config import ExportConfig, ParallelismConfig, PruneConfig, RunConfig, StoreConfig, VerifyConfig
from distill_nemo.fields import setting


@dataclass
class EvaluateConfig:
    """The evaluation of models by held-out data and benchmarks, as `nemo distill evaluate` launches it."""

    model: str | None = setting(None, "checkpoint of any kind that `train` reads, or its name on the Hugging Face Hub")
    baseline: str | None = setting(None, "a second model, measured in the same way")
    teacher: str | None = setting(None, "a third one, with which the others are compared on `data`")
    data: str | None = setting(None, "prefixes of held-out .bin/.idx files, separated by commas; each is a domain")
    sequence_length: int = setting(1024, "tokens of a sample of `data`", at_least=1)
    samples: int = setting(64, "samples of each domain; more than it holds repeats it", at_least=1)
    vocab_size: int | None = setting(None, "ids that the models keep on `data`, if checkpoints have more", at_least=1)
    tasks: str | None = setting(None, "benchmarks: tasks and groups of lm-evaluation-harness, separated by commas")
    output: str | None = setting(None, "directory of the benchmarks' results, from which the same command goes on")
    include_path: str | None = setting(None, "directory with further tasks: YAML files of lm-evaluation-harness")
    allow_code: bool = setting(False, "true if you trust include_path: its tasks may run Python code")
    limit: int | None = setting(None, "documents of each task, to try it out", at_least=1)
    num_fewshot: int | None = setting(None, "examples in a prompt; None: as the task says", at_least=0)
    apply_chat_template: bool = setting(False, "prompts as conversations, by the tokenizer's template")
    batch_size: int = setting(8, "sequences at a time on a GPU", at_least=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the weights in benchmarks; auto: as config.json says"
    )
    parallelize: bool = setting(False, "one process spreads a large model over its GPUs in benchmarks")
    tokenizer: str | None = setting(None, "a Hugging Face tokenizer directory, for models that have none")
    steps_of: str | None = setting(
        None, "in place of a model, output_dir of a run, whose steps are measured as they are saved, until it ends"
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
