"""Settings of benchmarks: of `nemo distill evaluate`, and of the job that measures the steps of a run. No torch."""

from dataclasses import dataclass, fields

from distill_nemo.fields import require, setting


@dataclass(kw_only=True)
class TasksConfig:
    """Tasks of lm-evaluation-harness, and how they are measured."""

    tasks: str | None = setting(None, "benchmarks: tasks and groups of lm-evaluation-harness, separated by commas")
    include_path: str | None = setting(None, "directory with further tasks: YAML files of lm-evaluation-harness")
    allow_code: bool = setting(False, "true if you trust include_path: its tasks may run Python code")
    limit: int | None = setting(None, "documents per task, for a trial", at_least=1)
    num_fewshot: int | None = setting(None, "examples in a prompt; None: as the task says", at_least=0)
    apply_chat_template: bool = setting(False, "render prompts with the tokenizer's chat template")
    batch_size: int = setting(8, "sequences at a time on a GPU", at_least=1)
    wait_minutes: float = setting(
        10.0,
        "minutes to wait for a run that has not begun, or whose process has ended, before the benchmarks fail; 0: "
        "measure what is saved, and end",
        at_least=0,
        at_most=10**6,
    )


@dataclass(kw_only=True)
class BenchmarksConfig(TasksConfig):
    """Benchmarks of every `training.benchmark_interval`-th step, and of the last.

    `nemo distill train` runs them in a job beside the run; training never waits for it.
    """

    devices: int | None = setting(
        None,
        "GPUs of that job, on one node; None: as many as a node of the run has, locally those that the run leaves",
        at_least=1,
    )

    def check(self, interval: int | None) -> None:
        """Refuse tasks without an interval, and settings without tasks.

        Args:
            interval: `training.benchmark_interval`; without tasks it keeps checkpoints for another command.

        Raises:
            ValueError: naming the field, and what to do.
        """
        require(
            self.tasks is None or interval is not None,
            f"benchmarks.tasks = {self.tasks} needs training.benchmark_interval, the steps from one measurement to the "
            "next; the last step is measured in any case",
        )
        for each in fields(self):
            value = vars(self)[each.name]
            require(
                self.tasks is not None or value == each.default,
                f"benchmarks.{each.name} = {value} needs benchmarks.tasks; set both",
            )
