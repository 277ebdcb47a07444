"""`nemo distill compress`: stages, refusals and the plan. Nothing is started; tests/cli/test_compress.py runs one."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from distill_nemo.models.checkpoints.write_safetensors import METADATA
from distill_nemo.pruning.stages import CompressConfig, fewest_nodes
from tests.cli.command import nemo_here, nemo_home
from tests.stores import manifest_of, write_store
from tests.tiny_models import write_hf

SLURM = ["run.executor=slurm", "run.executor.account=nlp", "run.executor.nodes=2", "run.executor.devices=2"]
KUBERNETES = ["run.executor=kubernetes", "run.executor.image=x", "run.executor.pvc=work", "run.executor.devices=2"]

HIDDEN = {"distillation__hidden_loss": "mse", "distillation__hidden_weight": 1.0}
HIDDEN["distillation__hidden_layers"] = '["decoder.layers.3:decoder.layers.3"]'


@pytest.fixture
def here(capfd, empty_stdin, tmp_path, monkeypatch):
    """Return a function that runs a command in this process and in an empty directory."""
    monkeypatch.chdir(tmp_path)
    nemo_home(monkeypatch, tmp_path / "home" / "nemo")
    return lambda *arguments: nemo_here(capfd, "compress", *arguments)


def small(inputs, **others):
    """Return arguments that cut and distil the tiny models in `inputs`; `section__field` replaces one."""
    fields = {
        "teacher": inputs / "teacher",
        "output": "out",
        "num_layers": 1,
        "data.train": json.dumps([str(inputs / "train")]),
        "data.valid": json.dumps([str(inputs / "valid")]),
        "data.tokenizer": inputs / "tokenizer",
        "data.sequence_length": 32,
        "samples": 8,
        "held_out_samples": 4,
        "optimizer.warmup_steps": 2,
        "training.steps": 8,
        "training.global_batch_size": 4,
        "training.eval_batches": 1,
    }
    fields |= {name.replace("__", "."): value for name, value in others.items()}
    return [f"{name}={value}" for name, value in fields.items() if value is not None]


def test_slurm_gets_a_job_for_each_stage_that_waits_for_the_one_before(inputs, here):
    shown = here("--dryrun", *small(inputs, parallelism__tensor_model_parallel_size=2), *SLURM)
    assert shown.code == 0, shown.err
    scripts = re.split(r"^# sbatch ", shown.out, flags=re.M)[1:]
    assert [re.search(r"--job-name=\S*distill\.(\w+)", each)[1] for each in scripts] == [
        *("prune", "distil", "evaluate", "report")
    ]
    assert [re.search(r"--nodes=(\d)", each)[1] for each in scripts] == ["1", "2", "1", "1"]
    assert [re.search(r"--gpus-per-node=(\d)", each)[1] for each in scripts] == ["2", "2", "2", "1"]
    assert ["--kill-on-invalid-dep=yes" in each for each in scripts] == [False, True, True, True]
    assert re.findall(r"^# (\w+), after (\w+)$", shown.out, re.M) == [
        *(("distil", "prune"), ("evaluate", "distil"), ("report", "evaluate"))
    ]


def test_jobs_before_one_that_slurm_refuses_are_cancelled(inputs, here, tmp_path, monkeypatch):
    commands = {
        "sbatch": "echo >> submitted; [ $(wc -l < submitted) = 1 ] && echo 7 || { echo no such nodes >&2; exit 1; }",
        "scontrol": "echo JobId=$5 JobState=PENDING",
        "scancel": "echo $1 >> cancelled",
    }
    for name, script in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    refused = here(*small(inputs), *SLURM)
    assert refused.code == 1 and "`sbatch` failed: no such nodes" in refused.err
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert not list((tmp_path / "home/nemo/experiments").glob("*/*"))


def test_kubernetes_gets_a_trainjob_for_each_stage(inputs, here):
    paths = {"teacher": "/workspace/teacher", "output": "/workspace/out", "data.valid": None}
    paths |= {"data.train": '["/workspace/train"]', "data.tokenizer": "/workspace/tokenizer"}
    shown = here("--dryrun", *small(inputs, **paths), *KUBERNETES)
    assert shown.code == 0, shown.err
    assert shown.out.count("kind: TrainJob") == 4
    assert "checkpoint: /workspace/out/pruned" in shown.out
    detached = here("--detach", *small(inputs, **paths), *KUBERNETES)
    assert detached.code == 1 and detached.err.startswith("error: ")


def test_every_stage_is_planned_before_the_first(inputs, tmp_path, here):
    teacher = write_hf(tmp_path / "teacher", "llama", width=256, heads=8, groups=4)
    target = {"num_layers": None, "num_query_groups": 2, "target_params": 800_000, "rounds": 2}
    planned = here("plan", *small(inputs, teacher=teacher, **target), "gpu=h200")
    assert planned.code == 0, planned.err
    rows = re.findall(r"^(prune-1|distil-1|prune-2|distil-2|evaluate|report) +1 ", planned.out, re.M)
    assert rows == ["prune-1", "distil-1", "prune-2", "distil-2", "evaluate", "report"]
    students = [int(each.replace(",", "")) for each in re.findall(r"^  student +([\d,]+)", planned.out, re.M)]
    assert students[0] > students[1] and 720_000 <= students[1] <= 800_000, "in two steps"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__global_batch_size": 6}, "training.global_batch_size 6 is not divisible"),
        ({"samples": 9}, "samples = 9 is not divisible by the 2 data-parallel ranks"),
        ({"parallelism__tensor_model_parallel_size": 3}, "world size 4 is not divisible by"),
    ],
)
def test_a_plan_refuses_what_the_stages_would(inputs, here, changes, message):
    refused = here("plan", *small(inputs, **changes), *SLURM)
    assert refused.code == 1 and refused.out == ""
    assert message in refused.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None}, "nothing says how small the model becomes"),
        ({"num_layers": 9}, "num_layers = 9 is not possible"),
        ({"num_layers": None, "target_params": 1e9}, "target_params=1000000000 cuts nothing"),
        ({"rounds": 2}, "rounds = 2 needs target_params or target_memory"),
        ({"teacher": "/no/such"}, "error: teacher: checkpoint directory not found: /no/such"),
        ({"data__train": '["no/such"]'}, "no file no/such.idx"),
        ({"samples": None, "parallelism__tensor_model_parallel_size": 2}, "world size 1 is not divisible"),
        ({"checkpoint__export": "false"}, "checkpoint.export = False"),
        ({"data__sequence_length": 4096}, "error: data.sequence_length = 4096 is longer than"),
        ({"data__valid": None, "data__split": '"1,0"'}, 'data.split = "1,0" leaves nothing of the 10 documents'),
        (HIDDEN, '"decoder.layers.3" does not exist; the model has layers 0 to 0'),
        ({"teacher": None}, "missing: teacher=; see `nemo distill compress --help`"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_stage(inputs, tmp_path, here, changes, message):
    refused = here(*small(inputs, **changes))
    assert refused.code == 1 and refused.out == ""
    assert refused.err.startswith("error: ") and message in refused.err
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


def test_a_recipe_of_another_command_is_refused(inputs, here):
    refused = here("recipes.quickstart.quickstart", *small(inputs))
    assert refused.code == 1 and "must return run.Partial(compress, ...), got" in refused.err


def test_all_data_of_the_distillation_is_checked_before_the_first_stage(inputs, tmp_path, here):
    for suffix in (".idx", ".bin"):
        (tmp_path / f"bad{suffix}").touch()
    refused = here(*small(inputs, data__valid='["bad"]'))
    assert refused.code == 1 and refused.err.startswith("error: data.valid: bad.idx is empty")
    store = tmp_path / "store"
    write_store(store, manifest_of(sequence_length=32))
    refused = here(*small(inputs, data__train=f'["{store}"]'))
    assert refused.code == 1 and "a run has a store or a teacher" in refused.err, refused.err


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("out/pruned/thesis", "out/pruned exists and is not a distill-nemo export"),
        ("out/student/thesis", "out/student exists and is not a distill-nemo export"),
        ("out/report/thesis", "out/report holds thesis, which is not part of a report"),
        ("out/checkpoints/iter_0000100", "output = out holds a checkpoint that no run of distill-nemo wrote"),
    ],
)
def test_directories_that_a_stage_may_not_write_are_refused_before_the_first(inputs, tmp_path, here, made, message):
    (tmp_path / made).mkdir(parents=True)
    refused = here(*small(inputs))
    assert refused.code == 1 and refused.err.startswith(f"error: {message}"), refused.err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "{", "generation_config.json cannot be read: "),
        ("tokenizer.json", "{", "transformers cannot open the tokenizer in"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "eos_token"),
    ],
)
def test_files_of_the_teacher_that_no_export_may_have_are_refused_before_the_first_stage(
    inputs, tmp_path, here, file, content, message
):
    teacher = tmp_path / "teacher"
    for source in (inputs / "teacher", inputs / "tokenizer"):
        shutil.copytree(source, teacher, dirs_exist_ok=True)
    (teacher / file).write_text(content)
    refused = here(*small(inputs, teacher=teacher, data__tokenizer=None))
    assert refused.code == 1 and message in refused.err and "Traceback" not in refused.err, refused.err


def test_an_output_with_the_run_of_another_student_is_refused(inputs, tmp_path, here):
    (tmp_path / "out/checkpoints/step_00000004").mkdir(parents=True)
    alien = here(*small(inputs))
    assert alien.code == 1 and "out holds the run of another student; restore" in alien.err
    (tmp_path / "out/pruned").mkdir()
    calibration = {"samples": 8, "held_out_samples": 4, "sequence_length": 32, "layer_importance": "cosine"}
    record = {"result": {"sizes": {"num_layers": 2}}, "calibration": calibration}
    (tmp_path / "out/pruned/pruning.json").write_text(json.dumps(record))
    other = here(*small(inputs))
    assert other.code == 1 and "out holds the run of another student (see out/pruned); restore" in other.err


def test_an_output_with_the_run_of_another_target_is_refused(inputs, tmp_path):
    from distill_nemo.cli.compress import foreseen

    teacher = write_hf(tmp_path / "teacher", "llama", width=256, heads=8, groups=4)
    config = CompressConfig(teacher=str(teacher), output=f"{tmp_path}/out", samples=8, held_out_samples=4)
    config.num_query_groups, config.target_params = 2, 800_000
    config.data.train, config.data.valid = [f"{inputs}/train"], [f"{inputs}/valid"]
    config.data.sequence_length = 32
    (cut,) = foreseen(config)
    (tmp_path / "out/checkpoints/step_00000004").mkdir(parents=True)
    (tmp_path / "out/pruned").mkdir()
    calibration = {"samples": 8, "held_out_samples": 4, "sequence_length": 32, "layer_importance": "cosine"}
    record = {"result": {"sizes": cut.possible[-1], "num_parameters": 790_000}, "calibration": calibration}
    (tmp_path / "out/pruned/pruning.json").write_text(json.dumps(record))
    save_file({"x": torch.ones(1)}, tmp_path / "out/pruned/model.safetensors", METADATA)
    assert foreseen(config)[0].possible == cut.possible
    config.target_params = 600_000
    with pytest.raises(ValueError, match="holds the run of another student"):
        foreseen(config)


def test_stages_that_only_run_models_take_the_fewest_nodes_that_hold_one():
    config = CompressConfig(teacher="a", output="b")
    for sizes, nodes in (((1, 1, 1, 1), 1), ((8, 2, 1, 1), 2), ((4, 1, 4, 1), 1), ((8, 1, 1, 4), 4)):
        par = config.parallelism
        par.tensor_model_parallel_size, par.pipeline_model_parallel_size, *rest = sizes
        par.context_parallel_size, par.expert_model_parallel_size = rest
        assert fewest_nodes(par, 8, 8) == nodes, sizes


def test_the_largest_part_of_a_blend_is_scored_with():
    config = CompressConfig(teacher="a", output="b")
    config.data.train = ["30", "x", "70", "y"]
    assert config.cut(1).data == "y"
    config.rounds = 2
    assert [config.cut(number).model for number in (1, 2)] == ["a", "b/round_1/student"]
    assert [config.run(number).output_dir for number in (1, 2)] == ["b/round_1", "b"]


def test_packs_are_scored_whole(tmp_path):
    from distill_nemo.pruning.calibration import with_sample_length

    config = CompressConfig(teacher="a", output="b")
    config.data.train = [f"{tmp_path}/x"]
    assert with_sample_length(config.cut(1)).sequence_length == 1024
    (tmp_path / "x.json").write_text('{"pack": 4096}')
    assert config.cut(1).sequence_length == 1024, "a launcher may not see the data"
    assert with_sample_length(config.cut(1)).sequence_length == 4096


def test_held_out_text_is_not_scored_with():
    config = CompressConfig(teacher="a", output="b")
    config.data.train = ["x"]
    assert config.cut(1).split == config.data.split
    config.data.valid = ["y"]
    assert config.cut(1).split == "1"


def test_every_candidate_of_a_round_can_be_cut_in_the_next(inputs, tmp_path, monkeypatch):
    """The first candidate could be, so without the others it would be refused after a round."""
    from distill_nemo.pruning import foreseen

    teacher = write_hf(tmp_path / "teacher", "llama", width=256, heads=8, groups=4)
    config = CompressConfig(teacher=str(teacher), output=f"{tmp_path}/out", rounds=2)
    config.num_query_groups, config.target_params = 2, 800_000
    config.data.train, config.data.sequence_length = ["any"], 32
    asked, candidates = [], foreseen.candidates
    monkeypatch.setattr(foreseen, "candidates", lambda *args: asked.append(args[0]) or candidates(*args))
    rounds = foreseen.foresee(config, has_data=False)
    assert len(asked) == len(rounds[0].possible) - 1 > 0
