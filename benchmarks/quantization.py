"""Quantise the quickstart's student and distil it further: `python -m benchmarks.quantization runs/quickstart`.

`make quickstart` comes before it. The teacher is the quickstart's, or the student before it was quantised. The
evaluation at step 0 is that of post-training quantisation, the last one that of quantisation-aware distillation, on the
same held-out windows. Beside it the student trained as long without quantisation. Three seeds of the order of the data.
Finished runs are kept in `<root>/quantization`, and the same command goes on with the others.
"""

import argparse
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import write_result
from distill_nemo.config import RunConfig, StudentConfig, TeacherConfig
from distill_nemo.quantization import FormatName, QuantizationConfig
from distill_nemo.runtime.device import setup_device

FORMATS: list[FormatName] = ["nvfp4", "int4_weights"]
TEACHERS = {"teacher": "teacher/student", "itself": "student"}  # directories in the quickstart's
METRICS = ("lm_loss", "forward_kl", "top1_agreement")
LEARNING_RATE = 1e-3
EVALUATED = 16  # global batches of 16 windows


@dataclass(frozen=True)
class Setting:
    """All that distinguishes a run.

    Args:
        format: of the student; "none" leaves it as it is.
        teacher: a key of `TEACHERS`.
        seed: of the order of the data.
        steps: of 16 windows of 128 tokens.
        lr: largest learning rate.
    """

    format: FormatName
    teacher: str
    seed: int
    steps: int
    lr: float

    def __str__(self) -> str:
        return f"{self.format} from {self.teacher}, {self.steps} steps at {self.lr:g}, seed {self.seed}"


def config_of(setting: Setting, root: Path, output: Path) -> RunConfig:
    """Return the quickstart's run with its student as it was exported, quantised."""
    from distill_nemo.executors import run_config_of
    from recipes import quickstart

    config, steps = run_config_of(quickstart(setting.steps, str(root))), setting.steps
    config.student = StudentConfig(checkpoint=str(root / "student"))
    config.teacher = TeacherConfig(checkpoint=str(root / TEACHERS[setting.teacher]))
    config.quantization = QuantizationConfig(format=setting.format)
    config.training = replace(config.training, data_seed=setting.seed, eval_interval=steps, eval_batches=EVALUATED)
    config.optimizer.lr, config.optimizer.min_lr = setting.lr, setting.lr / 10
    config.output_dir, config.checkpoint.save_interval, config.checkpoint.export = str(output), steps, False
    return config


def measured(root: Path, setting: Setting) -> dict[str, Any]:
    """Return the held-out metrics before the first step and after the last of a run, trained unless it has been."""
    from distill_nemo.training.entry import run_config

    output = root / "quantization" / str(setting)
    kept = output.parent / f"{output.name}.json"
    if not kept.exists():
        run_config(config_of(setting, root, output))
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        before, *_, after = (line for line in lines if line["kind"] == "eval")
        assert (before["step"], after["step"]) == (0, setting.steps), "evaluated before the first step, after the last"
        row: dict[str, Any] = asdict(setting)
        for when, line in (("before", before), ("after", after)):
            row[when] = {metric: line[metric] for metric in METRICS}
        kept.write_text(json.dumps(row) + "\n")
        shutil.rmtree(output)
        print(json.dumps(row), flush=True)
    return json.loads(kept.read_text())


def behind(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return how far a quantised student is from the plain one of the same steps, before and after training."""
    return {when: {name: row[when][name] - plain[when][name] for name in METRICS} for when in ("before", "after")}


def main() -> None:
    """Train what has not been trained, and write benchmarks/results/quantization_*.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("root", type=Path, help="the quickstart's directory")
    parser.add_argument("--steps", type=int, default=100, help="of 16 windows of 128 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=TEACHERS)
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    arguments = parser.parse_args()
    setup_device()
    rows = []
    for teacher in arguments.teachers:
        for seed in arguments.seeds:
            settings = [Setting(n, teacher, seed, arguments.steps, arguments.lr) for n in ("none", *arguments.formats)]
            plain, *quantised = (measured(arguments.root.absolute(), each) for each in settings)
            for row in quantised:
                row["behind"] = behind(row, plain)
            rows += [plain, *quantised]
    write_result("quantization", {"rows": rows})


if __name__ == "__main__":
    main()
