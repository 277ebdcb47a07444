"""A run's benchmarks in a job beside it: dry runs, and what is refused before anything starts.

Both jobs run in tests/distributed/benchmarks/test_beside.py.
"""

import re

import pytest
import yaml

from distill_nemo.executors import local
from distill_nemo.executors.local import LOCAL
from tests.cli.command import nemo_here, nemo_home, shrunk

pytestmark = pytest.mark.usefixtures("empty_stdin")
ONE_RANK = {"parallelism__tensor_model_parallel_size": 1, "parallelism__sequence_parallel": "false"}
TASK = "task: ours\ndataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}\n"


@pytest.fixture
def typed(inputs, tmp_path, monkeypatch, capfd):
    """Return a function that types `train` with benchmarks, in an empty directory, as a dry run."""
    monkeypatch.chdir(tmp_path)
    nemo_home(monkeypatch, tmp_path / "nemo")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(TASK)

    def run(*executor, root=inputs, **overrides):
        given = {"training__benchmark_interval": 4, "benchmarks__tasks": "ours", "benchmarks__include_path": "tasks"}
        given = {name: value for name, value in (ONE_RANK | given | overrides).items() if value is not None}
        fields = [f"run.executor{field}" for field in executor]
        return nemo_here(capfd, "train", "--factory", "llama32_3b_to_1b", "--dryrun", *shrunk(root, **given), *fields)

    return run


def refused(ended):
    assert ended.code == 1 and ended.out == "", ended
    return ended.err


def test_slurm_gets_a_second_job_of_one_node_that_begins_with_the_run(typed):
    ended = typed("=slurm", ".nodes=2", ".devices=4", ".time=7:00:00", ".account=nlp", training__global_batch_size=8)
    assert (ended.code, ended.err) == (0, "")
    run, beside = ended.out.split("# train-benchmarks, beside train\n")
    flags = [dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.M)) for script in (run, beside)]
    assert [each["job-name"] for each in flags] == ["distill.train", "distill.train-benchmarks"]
    assert [(each["nodes"], each["gpus-per-node"]) for each in flags] == [("2", "4"), ("1", "4")]
    assert all((each["time"], each["account"], each["signal"]) == ("7:00:00", "nlp", "URG@300") for each in flags)
    assert "--nproc-per-node 4" in beside and "train-benchmarks_fn_or_script" in beside


def test_kubernetes_gets_a_second_pod_that_shares_the_claim(typed, inputs, tmp_path):
    others = {"output_dir": "/workspace/run", "benchmarks__include_path": "/workspace/tasks"}
    fields = (".image=i:1", ".pvc=work", ".pvc_size=1Ti", ".devices=2", '.secrets={"HF_TOKEN": "hub/token"}')
    root = type(tmp_path)("/workspace")
    ended = typed("=kubernetes", *fields, root=root, benchmarks__devices=1, **others)
    assert (ended.code, ended.err) == (0, "")
    objects = list(yaml.safe_load_all(ended.out))
    (claim,) = (each for each in objects if each["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "pods of two jobs mount it"
    trainers = [each["spec"]["trainer"] for each in objects if each["kind"] == "TrainJob"]
    assert [(each["numNodes"], each["numProcPerNode"]) for each in trainers] == [(1, 2), (1, 1)]
    assert trainers[0]["env"] == trainers[1]["env"]
    assert "train-benchmarks_fn_or_script" in " ".join(trainers[1]["command"] + trainers[1].get("args", []))


def test_on_this_machine_it_is_a_second_process(typed):
    ended = typed()
    assert (ended.code, ended.err) == (0, "")
    assert "evaluate" in ended.out and "until_step" in ended.out


@pytest.mark.parametrize(
    ("visible", "asked", "given"), [("0,1,2,3", None, "2,3"), ("GPU-a,GPU-b,GPU-c,GPU-d", 1, "GPU-d")]
)
def test_it_gets_the_gpus_that_the_run_leaves(monkeypatch, visible, asked, given):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    executor = LOCAL.beside(local(2), local, asked)
    assert executor.env_vars["CUDA_VISIBLE_DEVICES"] == given
    assert executor.nproc_per_node() == len(given.split(","))


def test_without_a_gpu_left_the_command_is_refused(typed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    message = refused(typed("=local", ".processes=2"))
    assert "the run has 2 of this machine's 2 GPUs, and its benchmarks need 1 of their own: start fewer" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__benchmark_interval": None}, "benchmarks.tasks = ours needs training.benchmark_interval"),
        ({"benchmarks__tasks": None}, "benchmarks.include_path = tasks needs benchmarks.tasks"),
        pytest.param(  # the harness itself is imported for the answer
            {"benchmarks__tasks": "ours,gsm8kk"},
            'tasks: "gsm8kk" is not known. Did you mean gsm8k',
            marks=pytest.mark.long,
        ),
        ({"benchmarks__include_path": "none"}, "benchmarks.include_path = none is not a directory"),
        ({"data__tokenizer": "None"}, "benchmarks.tasks needs a tokenizer, and the student has none"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_start(typed, changes, message):
    assert message in refused(typed(**changes))


def test_tasks_that_run_code_are_refused_at_the_start(typed, tmp_path):
    (tmp_path / "tasks" / "code.yaml").write_text("task: code\nprocess_docs: !function no.f\n")
    assert "runs Python code; benchmarks.allow_code=true" in refused(typed())


def test_the_harness_own_tasks_are_found_in_its_files(typed):
    assert typed(benchmarks__tasks="gsm8k,mmlu", benchmarks__include_path=None).code == 0
