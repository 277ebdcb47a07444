"""Stages of `nemo distill compress`, killed and run again: the same student."""

import gc
import json
import os
import pkgutil
import signal
import weakref
from unittest import mock

import fiddle as fdl
import pytest

from distill_nemo.config import DataConfig, RunConfig, StudentConfig, TeacherConfig
from distill_nemo.pruning.stages import CompressConfig
from tests.spawn import Gloo, ProcessEndedError
from tests.tiny_models import write_hf

KILLED_AT = {  # of each stage, what it calls halfway, how often before it is killed, and by which signal
    "prune": ("distill_nemo.pruning.tensors.fsync", 0, signal.SIGURG),  # as before a time limit
    "distil": ("distill_nemo.training.loop.Loop._held_out", 1, signal.SIGKILL),
    "evaluate": ("distill_nemo.runtime.files.write_atomically", 0, signal.SIGURG),
    "report": ("distill_nemo.reports.page.write_page", 0, signal.SIGKILL),
}


def stages_left(inputs, output, changes, steps=4):
    """Return the stages of a compression that an earlier call has not finished."""
    from distill_nemo.cli.compress import Place, checked_stages

    fields = {"teacher": str(inputs / "teacher"), "samples": 8, "held_out_samples": 4} | changes
    config = CompressConfig(output=str(output), **fields)
    config.data.train, config.data.valid = [f"{inputs}/train"], [f"{inputs}/valid"]
    config.data.tokenizer, config.data.sequence_length = f"{inputs}/tokenizer", 32
    config.training.steps, config.training.global_batch_size = steps, 2
    config.training.eval_interval, config.training.eval_batches = 2, 1
    config.checkpoint.save_interval = 1
    return checked_stages(config, Place())


def names_left(*args):
    """Return the names of `stages_left`."""
    return [stage.name for stage in stages_left(*args)]


def compressed(inputs, output, changes, killed=""):
    """Run what is left in this process, as the jobs do. End by a signal in the stage `killed`. Return the names."""
    stages = stages_left(inputs, output, changes)
    for stage in stages:
        if stage.name == killed:
            kill_at(*KILLED_AT[killed])
        fdl.build(stage.task)()
    return [stage.name for stage in stages]


def kill_at(name, calls, number):
    """Send this process a signal at the call of a function after so many."""
    original, left = pkgutil.resolve_name(name), iter(range(calls))

    def call(*args, **kwargs):
        if next(left, None) is None:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    mock.patch(name, call).start()


def content(directory):
    """Return the bytes of every file but the card, which names the run's directory and counts its time."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


def test_killed_in_each_stage_and_run_again_it_gives_the_same_student(inputs, tmp_path, one):
    """One process for each kill: a killed one is gone."""
    expected, found = tmp_path / "undisturbed", tmp_path / "killed"
    sizes = {"num_layers": 2, "ffn_hidden_size": 64}
    for stage in KILLED_AT:
        with Gloo(1, init=False, timeout=200) as group, pytest.raises((ProcessEndedError, RuntimeError)):
            group.run(compressed, inputs, found, sizes, stage)
    assert one.run(compressed, inputs, found, sizes) == [["report"]]
    assert one.run(compressed, inputs, expected, sizes) == [list(KILLED_AT)]
    assert content(found / "student") == content(expected / "student")
    assert content(found / "pruned") == content(expected / "pruned")
    rows, again = (json.loads((path / "evaluation.json").read_text()) for path in (expected, found))
    assert rows == again
    assert [row["model"] for row in rows] == ["teacher", "pruned student", "distilled student"]
    assert rows[0]["parameters"] > rows[1]["parameters"] == rows[2]["parameters"]
    assert "distilled student" in (found / "report/report.html").read_text()
    (found / "evaluation.json").write_text(json.dumps(rows)[:-9])
    assert one.run(names_left, inputs, found, sizes) == [["evaluate", "report"]], "a damaged table is made again"


@pytest.mark.long
def test_in_two_rounds_the_second_one_cuts_the_first_ones_student_once(inputs, tmp_path, one):
    teacher = write_hf(tmp_path / "teacher", "llama", width=256, heads=8, groups=4)
    sizes = {"teacher": teacher, "num_query_groups": 2, "target_params": 800_000, "rounds": 2}
    (stages,) = one.run(compressed, inputs, tmp_path / "out", sizes)
    assert stages == ["prune-1", "distil-1", "prune-2", "distil-2", "evaluate", "report"]
    first, second = (
        json.loads((tmp_path / "out" / name / "pruning.json").read_text()) for name in ("round_1/pruned", "pruned")
    )
    assert second["model"]["path"].endswith("out/round_1/student")
    assert first["result"]["num_parameters"] == second["model"]["num_parameters"]
    assert first["result"]["num_parameters"] > second["result"]["num_parameters"] <= 800_000
    assert (tmp_path / "out/student/model.safetensors").is_file()
    assert one.run(names_left, inputs, tmp_path / "out", sizes) == [["report"]]
    later = one.run(names_left, inputs, tmp_path / "out", sizes, 6)
    assert later == [stages[1:]], "each round has more steps; its cut stays"
    again = tmp_path / "out/round_1/student/model.safetensors"
    again.write_bytes(again.read_bytes())
    assert one.run(names_left, inputs, tmp_path / "out", sizes) == [["report"]], "it is the same student"
    (tmp_path / "out/student/config.json").touch()
    assert one.run(names_left, inputs, tmp_path / "out", sizes) == [stages[-2:]], "and may be another"


def models_left(inputs, output):
    """Evaluate a student twice as the stage does, the second time with an offloaded teacher.

    Return the models of before that are in memory when one is built, the elements of its teacher's layers, and means.
    """
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from distill_nemo.reports import compressed
    from distill_nemo.training import evaluate

    built, left, elements, means, build = [], [], [], [], evaluate._model

    def watched(*args):
        left.append(sum(each() is not None for each in built))
        built.append(weakref.ref(model := build(*args)))
        elements.append(sum(each.numel() for each in model.teacher_model.decoder.layers.parameters()))
        return model

    data = DataConfig(train=[f"{inputs}/train"], valid=[f"{inputs}/valid"], sequence_length=32)
    config = RunConfig(str(output), StudentConfig(), TeacherConfig(f"{inputs}/teacher"), data=data)
    config.training.eval_batches, config.training.global_batch_size = 1, 2
    gc.disable()
    with mock.patch.object(evaluate, "_model", watched):
        for offload in (False, True):
            config.distillation.offload_teacher = offload
            means.append(compressed._means(StudentConfig(f"{inputs}/student"), config))
    gc.enable()
    return left, elements, means


def test_one_student_is_in_memory_at_a_time_and_no_offloaded_teacher(inputs, tmp_path, one):
    ((left, elements, means),) = one.run(models_left, inputs, tmp_path)
    assert left == [0, 0] and elements[0] > elements[1] == 0
    assert means[0] == means[1]
