"""Stages of `nemo distill compress`: in each round a cut and a distillation, then evaluation and report. No torch."""

from dataclasses import dataclass, field, fields, replace

from distill_nemo.config import (
    CheckpointConfig,
    CutConfig,
    DataConfig,
    DistillationConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelismConfig,
    PruneConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from distill_nemo.data.token_files import parse_blend
from distill_nemo.fields import require, setting
from distill_nemo.push_config import PushConfig

SAMPLE_TOKENS = 1024  # of a sample to score with, unless `data.sequence_length` is shorter


@dataclass
class CompressConfig(CutConfig):
    """A student cut out of its teacher, distilled, evaluated and reported.

    The last round is a run in `output`; earlier ones are in `output`/round_1 and so on. Each run has `pruned`, the
    student before the distillation, and `student`, the one after it.
    """

    teacher: str = field(metadata={"help": "Hugging Face directory, to cut and to imitate"})
    output: str = field(metadata={"help": "directory for everything: student/, report/, pruned/, checkpoints/"})
    rounds: int = setting(
        1, "times to prune and distil, each a step of equal ratio towards the target; training.steps each", at_least=1
    )
    prompts: list[str] = setting([], "beginnings of text that the student goes on with in the report")
    data: DataConfig = field(default_factory=DataConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def directory(self, number: int) -> str:
        """Return the output directory of a round; rounds are counted from 1."""
        return self.output if number == self.rounds else f"{self.output}/round_{number}"

    def cut(self, number: int, target: float | None = None) -> PruneConfig:
        """Return the cut of a round; `target` replaces the stated target.

        It has the layout of the distillation, in which every sample is whole.
        """
        stated = {each.name: vars(self)[each.name] for each in fields(CutConfig)}
        if target is not None:
            stated |= {"target_params": target, "target_memory": None, "target_gpu": None}
        return PruneConfig(
            **stated,
            model=self.teacher if number == 1 else f"{self.directory(number - 1)}/student",
            output=f"{self.directory(number)}/pruned",
            data=_largest_part(self.data.train),
            split="1" if self.data.valid else self.data.split,  # else held-out text would be scored with
            sequence_length=min(self.data.sequence_length, SAMPLE_TOKENS),
            parallelism=self.parallelism.without_training(),
        )

    def run(self, number: int) -> RunConfig:
        """Return the distillation of a round. The last one's student is pushed, if any is."""
        sections = {each.name: vars(self)[each.name] for each in fields(RunConfig) if each.name in vars(self)}
        student = StudentConfig(checkpoint=f"{self.directory(number)}/pruned")
        sections |= {"student": student, "teacher": TeacherConfig(checkpoint=self.teacher)}
        if number < self.rounds:
            sections["checkpoint"] = replace(self.checkpoint, **vars(PushConfig()))
        return RunConfig(output_dir=self.directory(number), **sections)


def check_compress(config: CompressConfig) -> None:
    """Refuse a config whose stages do not fit together. The stages' own checks come after it.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    require(bool(config.data.train), "data.train is empty: name the token files made by `nemo distill prepare`")
    require(config.checkpoint.export, "checkpoint.export = False: the student would not be written; leave it out")
    require(
        config.distillation.uses_logits,
        "distillation.logits_weight = 0: the student would not imitate its teacher; set it above 0",
    )
    targets = [config.target_params, config.target_memory]
    require(
        config.rounds == 1 or any(value is not None for value in targets),
        f"rounds = {config.rounds} needs target_params or target_memory, which each round comes closer to",
    )


def fewest_nodes(parallelism: ParallelismConfig, nodes: int, devices: int) -> int:
    """Return the number of nodes, at most `nodes`, whose ranks hold one copy of a model at a layout."""
    par = parallelism.without_training()
    copy = par.model_parallel_size * par.expert_model_parallel_size
    return next((count for count in range(1, nodes) if count * devices % copy == 0), nodes)


def _largest_part(blend: list[str]) -> str:
    """Return the part of `data.train` with the largest weight; the first of equal ones."""
    prefixes, weights = parse_blend("data.train", blend)
    return max(zip(prefixes, weights or [1.0] * len(prefixes), strict=True), key=lambda part: part[1])[0]
