"""Names of checkpoints, the record of their run, and the checks before a run resumes from one. No torch.

`<output_dir>/checkpoints/step_00000120/` holds Megatron's distributed checkpoint, `run.json` (the config, and hashes of
models and data), `architecture.json` (the student's) and `SHA256SUMS`. `latest` names the newest checkpoint. It is
written last, so that checkpoint was whole at the time.
"""

import contextlib
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill_nemo.config import DataConfig, DistillationConfig, StudentConfig, TeacherConfig
from distill_nemo.models.sources import STEP, saved_steps
from distill_nemo.quantization import QuantizationConfig
from distill_nemo.runtime.checksums import identity_of
from distill_nemo.runtime.files import read_object, read_object_if_any, remove_directory, write_atomically

MAY_CHANGE = ("num_workers", "cache", "fused_linear", "offload_teacher")
SECTIONS: dict[str, Any] = {
    "student": StudentConfig,
    "teacher": TeacherConfig,
    "distillation": DistillationConfig,
    "quantization": QuantizationConfig,
    "data": DataConfig,
}
FIXED = (
    ("training", "global_batch_size"),
    ("training", "seed"),
    ("training", "data_seed"),
    ("optimizer", "use_distributed_optimizer"),  # it changes how Megatron saves groups of parameters
)
BENCHMARKS = "benchmarks"  # directory of a run, with the scores of its steps
FOLDERS = ("checkpoints", "index_cache", "tensorboard", BENCHMARKS)  # of a run
FILES = (
    *("config.yaml", "metrics.jsonl", "hashes.json", "run.lock", "evaluation.json", "calibration.json"),
    "benchmarks.jsonl",
)
OUR_PATTERNS = ("step_*", "latest", "latest.partial", "latest.old")
FOREIGN = ("*.safetensors", ".metadata", "latest_checkpointed_iteration.txt", "iter_*", "model_weights", "latest")


def checkpoint_root(output_dir: str) -> Path:
    """Return the directory of a run's checkpoints."""
    return Path(output_dir) / "checkpoints"


def step_directory(root: Path, step: int) -> Path:
    """Return the directory of a step."""
    return root / f"step_{step:08d}"


def benchmarks_of(run: Path, step: int) -> Path:
    """Return the file with the scores of a step."""
    return run / BENCHMARKS / f"step_{step:08d}.json"


def measured_identity(run: Path, step: int) -> str:
    """Return the `identity_of` the checkpoint that the scores of a step are of; "" without scores that say so."""
    try:
        found = read_object_if_any(benchmarks_of(run, step)).get("identities")
    except ValueError:
        return ""
    return str(found.get(f"step {step}", "")) if isinstance(found, dict) else ""


def read_record(directory: Path) -> dict[str, Any]:
    """Return `run.json` of a checkpoint.

    Raises:
        ValueError: if it is not a record of our runs.
    """
    record = read_object(directory / "run.json")
    record.setdefault("quantization", asdict(QuantizationConfig()))  # an older version had none
    for section in (*SECTIONS, "optimizer", "training"):
        if not isinstance(record.get(section), dict) and (section != "teacher" or record.get(section, 0) is not None):
            raise ValueError(f'{directory / "run.json"} is damaged: it has no section "{section}"')
    for section, name in (*FIXED, ("training", "steps")):
        if name not in record[section]:
            raise ValueError(f"{directory / 'run.json'} is damaged: it lacks {section}.{name}")
    if not isinstance(record.setdefault("contents", {}), dict):
        raise ValueError(f'{directory / "run.json"} is damaged: "contents" is no JSON object')
    return record


def point_latest_at(directory: Path) -> None:
    """Make `directory` the newest checkpoint, atomically and durably."""
    tracker = directory.parent / "latest"
    if tracker.is_dir() and not tracker.is_symlink():  # a user's copy of a checkpoint, which is moved aside
        shutil.rmtree(tracker.with_name("latest.old"), ignore_errors=True)
        tracker.rename(tracker.with_name("latest.old"))
    write_atomically(tracker, directory.name)


def is_measured(run: Path, step: int) -> bool:
    """Return True if the scores of a step are of the checkpoint that is there now."""
    return measured_identity(run, step) == identity_of(step_directory(run / "checkpoints", step))


def prune(newest: Path, keep_last: int, benchmark_interval: int | None = None) -> None:
    """Keep `keep_last` steps up to `newest`. Delete older ones and the remains of interrupted saves.

    Later steps stay. They are left from before the run was resumed at an earlier step, and it will replace them. So do
    multiples of `benchmark_interval` until they are measured, which scores of an earlier checkpoint of that step do not
    count as.
    """
    root, steps = newest.parent, saved_steps(newest.parent)
    for old in steps[steps.index(newest) + max(keep_last, 1) :]:
        step = int(old.name[5:])
        if benchmark_interval is None or step % benchmark_interval or is_measured(root.parent, step):
            with contextlib.suppress(OSError):
                delete(old)
    for partial in newest.parent.glob("step_*.partial"):
        remove_directory(partial)


def delete(step: Path) -> None:
    """Delete a checkpoint at one stroke: another process sees all of it or nothing.

    Raises:
        OSError: if it stays.
    """
    removed = step.with_name(f"{step.name}.deleted.partial")
    remove_directory(removed)
    step.rename(removed)
    remove_directory(removed)


def linked(step: Path, target: Path) -> bool:
    """Link the files of a checkpoint in `target`, where they stay if its run deletes it; return False if it has.

    If a resumed run saves the step again meanwhile, `target` has the new one, and nothing of the old one.

    Raises:
        OSError: if the file system has neither links nor space for copies.
    """
    while (before := _identity(step)) is not None:
        try:
            shutil.copytree(step, target, copy_function=_link)
        except OSError:
            if _identity(step) == before:
                raise
        if _identity(step) == before:  # so it was whole until now
            return True
        shutil.rmtree(target, ignore_errors=True)
    return False


def _identity(step: Path) -> tuple[int, int] | None:
    """Return what tells a checkpoint from one that replaces it, which is written beside it; None if there is none."""
    try:
        found = step.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def check_output_dir(output_dir: str) -> None:
    """Refuse a directory that holds checkpoints of another program, or files and directories in each other's place.

    Raises:
        ValueError: naming the checkpoint or the path.
    """
    directory, root = Path(output_dir), checkpoint_root(output_dir)
    for path in (directory, *(directory / name for name in FOLDERS)):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir = {output_dir}: {path} is a file; choose another output_dir")
    for path in (directory / name for name in FILES):
        if path.exists() and not path.is_file():
            raise ValueError(f"output_dir = {output_dir}: {path} is not a file; choose another output_dir")
    strange = [path for pattern in FOREIGN for path in directory.glob(pattern)]
    for path in root.iterdir() if root.is_dir() else ():
        if STEP.fullmatch(path.name.removesuffix(".partial")) and not path.is_dir():
            raise ValueError(
                f"output_dir = {output_dir}: {path} is a file and has the name of a checkpoint; move it, or choose "
                "another output_dir"
            )
        if not any(path.match(pattern) for pattern in OUR_PATTERNS):
            strange.append(path)
    if strange:
        raise ValueError(
            f"output_dir = {output_dir} holds a checkpoint that no run of distill-nemo wrote there: {strange[0]}; "
            "choose another output_dir"
        )


def check_resumable(saved: dict[str, Any], now: dict[str, Any], resume: bool) -> None:
    """Refuse to resume with another model, teacher, loss or data than the run in the output directory.

    Args:
        saved: `run.json` of its newest checkpoint.
        now: `run_record` of this run. If both have a hash for a path, the hashes decide, since the file may have moved.
        resume: `checkpoint.resume`.

    Raises:
        ValueError: naming each field that differs, and what to do.
    """
    if not resume:
        raise ValueError(
            f"{now['output_dir']} already holds a run and checkpoint.resume is off: choose another output_dir, or "
            "delete it"
        )
    differences = []
    for section, kind in SECTIONS.items():
        before = asdict(kind()) | saved[section] if saved[section] else {}  # an older version knew fewer fields
        after = now[section] or {}
        unknown = {"family_fields"} - saved[section].keys() if saved[section] else set()  # an older version had none
        for name in sorted((before.keys() | after.keys()) - set(MAY_CHANGE) - unknown):
            differences += _difference(f"{section}.{name}", before.get(name), after.get(name), saved, now)
    for section, name in FIXED:
        differences += _difference(f"{section}.{name}", saved[section][name], now[section][name], saved, now)
    if differences:
        raise ValueError(
            f"{now['output_dir']} holds another run:\n  "
            + "\n  ".join(differences)
            + "\nRestore these to resume it, or choose another output_dir"
        )


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the changes that a resumed run makes from here on: optimizer, schedule, number of steps."""
    found = []
    for name in now["optimizer"]:
        found += _difference(f"optimizer.{name}", saved["optimizer"].get(name), now["optimizer"][name], saved, now)
    for line in _difference("training.steps", saved["training"]["steps"], now["training"]["steps"], saved, now):
        decays = now["optimizer"]["decay_steps"] is None and now["optimizer"]["decay_style"] != "constant"
        found.append(line + (", to where the learning rate decays" if decays else ""))
    if "identity" in saved:  # written by the first release, in which Megatron shuffled all passes together
        found.append("samples: in another order from here on, if the run takes more than one pass over its data")
    return found


def _difference(field: str, before: Any, after: Any, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    # Runs of the first release have no hashes, so for them the paths decide.
    contents = [record["contents"].get(field) for record in (saved, now)]
    if None not in contents:
        if contents[0] == contents[1]:
            return []
        if before == after and field != "student.checkpoint":  # a resumed run has the student's weights already
            return [f"{field}: {after!r} holds other contents than when the run began"]
    return [f"{field}: was {before!r}, is {after!r}"] if before != after else []
