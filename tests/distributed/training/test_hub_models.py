"""A run of models that are named on the Hugging Face Hub, against a double of it; then its branch moves."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from distill_nemo.checkpoint.export import export
from distill_nemo.config import ExportConfig
from distill_nemo.training.entry import run_config
from tests.hub_downloads import Hub, asked
from tests.tiny_models import write_hf
from tests.training import metrics, tiny_run


def run(url, home, inputs, output, steps, teacher="org/teacher"):
    """Run a config from hub names on this rank, and return what it prints."""
    config = tiny_run(inputs, output, steps=steps)
    config.checkpoint.save_interval = 2
    config.checkpoint.export = steps == 4
    config.optimizer.warmup_steps, config.optimizer.decay_steps = 0, 4
    config.student.checkpoint, config.teacher.checkpoint = "org/student", teacher
    config.data.tokenizer = "org/teacher"
    config.logging.mlflow_experiment = "kd"
    os.environ |= mlflow_in(home)
    printed = io.StringIO()
    with asked(url, home), contextlib.redirect_stdout(printed):
        run_config(config)
    return printed.getvalue()


def mlflow_in(home):
    return {"MLFLOW_TRACKING_URI": f"file:{home}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}


def recorded_in_mlflow(home):
    """Return the teacher of the only run in MLflow, and its steps."""
    os.environ |= mlflow_in(home)
    from mlflow.tracking import MlflowClient

    (found,) = MlflowClient().search_runs([MlflowClient().get_experiment_by_name("kd").experiment_id])
    steps = [each.step for each in MlflowClient().get_metric_history(found.info.run_id, "train/lm_loss")]
    return found.data.params["teacher.checkpoint"], steps


def run_by_directories(inputs, output):
    config = tiny_run(inputs, output, steps=4)
    config.checkpoint.save_interval = 2
    config.optimizer.warmup_steps = 0
    run_config(config)


def exported(url, home, output, target):
    with asked(url, home):
        export(ExportConfig(str(output), str(target)))


def test_a_resumed_run_keeps_the_commits_of_its_models(inputs, one, tmp_path):
    with Hub() as hub:
        files = tmp_path / "files"
        shutil.copytree(inputs / "teacher", files)
        shutil.copytree(inputs / "tokenizer", files, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
        student, teacher = hub.commit("org/student", inputs / "student"), hub.commit("org/teacher", files)
        output, asking = tmp_path / "run", (hub.url, tmp_path / "home", inputs, tmp_path / "run")
        (printed,) = one.run(run, *asking, 2)
        assert f"teacher.checkpoint: org/teacher is at {teacher}\n" in printed
        record = json.loads((output / "checkpoints" / "step_00000002" / "run.json").read_text())
        named = [record["student"]["checkpoint"], record["teacher"]["checkpoint"], record["data"]["tokenizer"]]
        assert named == [f"org/student@{student}", f"org/teacher@{teacher}", f"org/teacher@{teacher}"]
        assert f"checkpoint: org/teacher@{teacher}\n" in (output / "config.yaml").read_text()

        write_hf(files, "llama", seed=7)
        moved = hub.commit("org/teacher", files)
        with pytest.raises(ValueError, match=rf"teacher.checkpoint: was 'org/teacher@{teacher}', is '\S+@{moved}'"):
            one.run(run, *asking, 4, f"org/teacher@{moved}")
        (printed,) = one.run(run, *asking, 4)
        told = f"teacher.checkpoint: org/teacher is at {moved} now; the job goes on with {teacher}, as it began\n"
        assert told in printed
        assert hub.strange == []
    (of_mlflow,) = one.run(recorded_in_mlflow, tmp_path / "home")
    assert of_mlflow == (f"org/teacher@{teacher}", [1, 2, 3, 4])
    one.run(run_by_directories, inputs, tmp_path / "plain")
    trained = [[line for line in metrics(each) if line["kind"] == "train"] for each in (output, tmp_path / "plain")]
    assert trained[0] == trained[1] and len(trained[0]) == 4
    assert not (output / "student" / "model.safetensors").is_symlink()
    assert json.loads((output / "student" / "tokenizer.json").read_text())["model"]
    (output / "student" / "tokenizer.json").unlink()
    one.run(exported, hub.url, tmp_path / "home", output, tmp_path / "again")  # the hub is gone, the cache is there
    assert Path(tmp_path, "again", "tokenizer.json").is_file()
