"""Batch script that a dry run of `run.executor=slurm` prints, without a cluster, and refusals.

Tests on a real SLURM are in tests/launch/slurm.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess

import nemo_run as run
import pytest

from distill_nemo.config import ParallelismConfig, RunConfig, StudentConfig
from distill_nemo.executors import slurm
from distill_nemo.executors.secrets import refuse_secrets
from distill_nemo.executors.slurm.arguments import CommittedCode, seconds_of
from tests.cli.command import nemo_here, nemo_home, shrunk

LLAMA = ("train", "--factory", "llama32_3b_to_1b")


pytestmark = pytest.mark.usefixtures("empty_stdin")


@pytest.fixture
def dry(inputs, tmp_path, monkeypatch, capfd):
    """Return a function that does a dry run with further fields, in an empty directory, and returns the script."""
    monkeypatch.chdir(tmp_path)
    nemo_home(monkeypatch, tmp_path / "nemo")

    def script(*fields, **overrides):
        given = [*shrunk(inputs, **overrides), "run.executor=slurm", *(f"run.executor.{field}" for field in fields)]
        ended = nemo_here(capfd, *LLAMA, "--dryrun", *given)
        assert ended.code == 0, ended.err
        assert not list(tmp_path.glob("nemo/experiments/*/*"))
        return ended

    return script


def flags(script):
    """Return the `#SBATCH` lines as a dictionary."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M))


def srun(script):
    """Return the arguments of the line that starts the ranks, split as the shell does."""
    lines = [line for line in script.splitlines() if line.startswith("srun --output")]
    assert len(lines) == 1
    return shlex.split(lines[0])


@pytest.mark.parametrize("command", [["teacher", "output=store", "windows=64"], ["teacher", "verify", "store=store"]])
def test_jobs_on_stores_are_submitted_like_runs(command, inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    nemo_home(monkeypatch, tmp_path / "nemo")
    data = [f'data.train=["{inputs}/train"]'] if "verify" not in command else []
    given = [*command, f"teacher.checkpoint={inputs}/teacher", *data, "run.executor=slurm", "run.executor.nodes=2"]
    ended = nemo_here(capfd, *given, "run.executor.devices=4", "run.executor.retries=1", "--dryrun")
    assert (ended.code, ended.err) == (0, "")
    assert flags(ended.out)["nodes"] == "2" and "teacher" in flags(ended.out)["job-name"]
    assert "export TORCHX_MAX_RETRIES=1\n" in ended.out and "--nproc-per-node 4" in " ".join(srun(ended.out))
    assert not list(tmp_path.glob("nemo/experiments/*/*"))


def test_every_argument_is_in_the_script(dry, tmp_path):
    script = dry(
        "account=nlp",
        "partition=batch",
        "nodes=2",
        "devices=4",
        "cpus_per_device=3",
        "exclusive=true",
        "time=1-02:30",
        "stop_seconds=90",
        "retries=5",
        "qos=high",
        'env={"WORDS": "two words", "NCCL_DEBUG": "INFO"}',
        'setup=["module load cuda", "ulimit -n 4096"]',
        parallelism__tensor_model_parallel_size=4,
    ).out
    found = flags(script)
    for name, value in {
        "account": "nlp",
        "partition": "batch",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "4",
        "cpus-per-task": "12",
        "exclusive": "",
        "time": "1-02:30",
        "signal": "URG@90",
        "qos": "high",
        "job-name": "distill.train",
    }.items():
        assert found[name] == value, name
    assert "export TORCHX_MAX_RETRIES=5\n" in script
    assert "export WORDS='two words'\n" in script and "export NCCL_DEBUG=INFO\n" in script
    assert "export SRUN_CPUS_PER_TASK=12\n" in script and "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90\n" in script
    assert "\nmodule load cuda\nulimit -n 4096\n" in script
    given = srun(script)
    assert [word for word in given if word.startswith("--chdir")][-1] == f"--chdir={tmp_path}", "the last one counts"
    after = dict(itertools.pairwise(given))
    assert (after["--nnodes"], after["--nproc-per-node"], after["--node-rank"]) == ("2", "4", "$SLURM_NODEID")
    assert re.match(r"# sbatch --requeue --parsable /\S+/train_sbatch.sh\n#!/bin/bash\n", script)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


SHELL = ["$(touch ran)", "`touch ran`", "a b", "a;touch ran", '"a', "it's", "$HOME", "a|b>ran", "*", "#a", "~"]


@pytest.mark.parametrize("text", SHELL)
def test_what_the_shell_would_read_reaches_srun_as_typed(dry, tmp_path, text):
    script = dry(
        "devices=2",
        f"container_image=image{text}",
        f"container_mounts={[f'/{text}:/{text}']!r}",
        f"env={ {'X': text}!r}",
        output_dir=tmp_path / "out",
        teacher__checkpoint=tmp_path / "t",
        student__checkpoint=tmp_path / "s",
        data__train='["/d"]',
        data__valid='["/d"]',
        data__tokenizer="/tok",
    ).out
    script = re.sub(r"^(?=srun --output)", "printf '%s\\n' ", script, flags=re.M)
    script = re.sub(
        r"^(nodes|head_node_ip)=.*$|^set .*$", "", script, flags=re.M
    )  # this machine has neither scontrol nor srun
    script = script.replace("exit $exitcode", "").replace("exitcode=$?", 'printf "%s" "$X" > env; exitcode=0')
    out = subprocess.run(["bash"], input=script, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    given = dict(itertools.pairwise(out.splitlines()))
    assert given["--container-image"] == f"image{text}"
    assert given["--container-mounts"].startswith(f"/{text}:/{text},")
    assert (tmp_path / "env").read_text() == text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", SHELL)
@pytest.mark.parametrize(
    "field", ["srun_args=['{}']", "container_env=['{}']", "job_name_prefix={}", "additional_parameters={{'{}': 1}}"]
)
def test_what_the_shell_would_read_is_refused_by_name(capfd, monkeypatch, tmp_path, inputs, field, text):
    monkeypatch.chdir(tmp_path)
    nemo_home(monkeypatch, tmp_path / "nemo")
    word = field.format(text.replace("'", "\\'") if "'{}'" in field else text)
    ended = nemo_here(capfd, *LLAMA, "--dryrun", *shrunk(inputs), "run.executor=slurm", f"run.executor.{word}")
    assert ended.code == 1 and ended.err.startswith(f"error: run.executor.{field.partition('=')[0]}")
    assert len(ended.err.splitlines()) == 1 and text in ended.err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["setup=['export X=\"a b']"], "run.executor.setup: bash cannot parse it"),
        (["setup=['if true']"], "run.executor.setup: bash cannot parse it"),
        (["setup=['cat > env <<END', 'X=1']"], "run.executor.setup: bash cannot find its end"),
        (["setup=['cd /nemo_run/x']"], 'run.executor.setup: NeMo-Run replaces "/nemo_run"'),
        (["env={'X': '/data/nemo_run'}"], 'run.executor.env: NeMo-Run replaces "/nemo_run"'),
        (["comment=/nemo_run"], 'run.executor.comment: NeMo-Run replaces "/nemo_run"'),
        (["env_vars={'X': '$(touch ran)'}"], 'unknown field "run.executor.env_vars"'),
        (["env={'x': '1'}"], '"x" is not in capitals'),
        (["comment=a\nb"], "run.executor.comment has two lines"),
        (["job_name_prefix="], "run.executor.job_name_prefix has no value"),
        (["host=a;b", "user=u", "job_dir=/j"], 'run.executor.host = "a;b" has characters'),
        (["host=-oProxyCommand=x", "user=u", "job_dir=/j"], 'run.executor.host = "-oProxyCommand=x" has'),
        (["host=h", "user=$(u)", "job_dir=/j"], 'run.executor.user = "$(u)" has characters'),
        (["host=h", "user=u", "job_dir=/j k"], 'run.executor.job_dir = "/j k" has characters'),
        (["host=h", "user=u", "job_dir=/j", "identity=/a b"], 'run.executor.identity = "/a b" has characters'),
    ],
)
def test_what_would_not_come_as_typed_is_refused(capfd, monkeypatch, tmp_path, inputs, fields, message):
    monkeypatch.chdir(tmp_path)
    nemo_home(monkeypatch, tmp_path / "nemo")
    given = ["run.executor=slurm", *(f"run.executor.{field}" for field in fields)]
    absolute = {name: f"{tmp_path}/x" for name in ("output_dir", "teacher__checkpoint", "student__checkpoint")}
    ended = nemo_here(capfd, *LLAMA, "--dryrun", *shrunk(inputs, **absolute), *given)
    assert ended.code == 1 and ended.err.startswith("error: ") and message in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "backend"),
    [
        (["nodes=2"], "nodes"),
        (["nodes=1", "devices=2"], "loopback"),
        (["nodes=1", "devices=2", "packager=git"], "c10d"),
    ],
)
def test_the_rendezvous_is_ours_where_it_is_installed(dry, monkeypatch, fields, backend):
    monkeypatch.setattr(CommittedCode, "package", lambda *_: "")
    monkeypatch.chdir(os.path.dirname(__file__))
    given = srun(dry(*fields).out)
    assert dict(itertools.pairwise(given))["--rdzv-backend"] == backend


def test_a_word_that_is_quoted_for_the_shell_is_taken(dry):
    assert "--comment=a b" in srun(dry("devices=2", "srun_args=['--chdir=/x', \"'--comment=a b'\"]").out)


def test_the_least_a_user_says(dry):
    found = flags(dry("devices=2").out)
    assert not {"account", "partition", "exclusive", "cpus-per-task"} & set(found)
    assert (found["nodes"], found["gpus-per-node"], found["signal"]) == ("1", "2", "URG@300")
    assert "gpus-per-node" not in flags(dry("devices=2", "gpus=false").out)


def test_a_container_is_named_to_srun(dry, inputs, tmp_path):
    script = dry(
        "devices=2",
        "container_image=nvcr.io#nvidia/pytorch:25.09-py3",
        'container_mounts=["/models:/models", "/runs:/runs"]',
        output_dir="/runs/one",
    ).out
    given = srun(script)
    after = dict(itertools.pairwise(given))
    assert after["--container-image"] == "nvcr.io#nvidia/pytorch:25.09-py3"
    assert after["--container-mounts"].startswith("/models:/models,/runs:/runs,")
    assert "--chdir" not in " ".join(given) and "export PATH" not in script, "the image's own"
    assert given[-1] == "/nemo_run/configs/train_fn_or_script"


def test_over_ssh_nothing_connects_and_paths_are_the_clusters(dry):
    ssh = ["devices=2", "host=login.example", "user=me", "job_dir=/lustre/me/jobs"]
    script = dry(*ssh, output_dir="/lustre/me/one").out
    assert re.search(
        r"^#SBATCH --output=/lustre/me/jobs/train/train_\d+/train/sbatch_distill.train_%j.out$", script, re.M
    )
    assert "export PATH" not in script
    assert "--chdir=/lustre/me/work" in srun(dry(*ssh, "workdir=/lustre/me/work").out)


def test_shipped_code_comes_first_and_what_is_not_shipped_is_reported(dry, tmp_path):
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first", "--allow-empty"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True, cwd=tmp_path)
    (tmp_path / ".git" / "info" / "exclude").write_text("nemo/\n")  # NeMo-Run's home, which the fixture puts here
    (tmp_path / "mine.py").write_text("changed = True\n")
    ended = dry("devices=2", "packager=git")
    assert re.search(r"^export PYTHONPATH=/\S+/train/code:\$PYTHONPATH$", ended.out, re.M)
    assert ended.err == "warning: not shipped, because not committed: mine.py (1 in total)\n"
    subprocess.run(["git", "add", "."], check=True, cwd=tmp_path)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"], check=True, cwd=tmp_path)
    assert dry("devices=2", "packager=git").err == ""


@pytest.mark.parametrize(
    ("fields", "overrides", "message"),
    [
        (["nodes=3"], {}, "You asked for 3 nodes x 1 devices; with 1 devices a node, run.executor.nodes = 2, 4 fit"),
        (["nodes=1"], {}, "world size 1 is not divisible by tensor x pipeline x context parallel size = 2 x 1 x 1"),
        (["devices=0"], {}, "run.executor.devices must be at least 1, got 0"),
        (["nodes=two"], {}, "run.executor.nodes must be int, got 'two'"),
        (["time=soon"], {}, 'run.executor.time must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, got "soon"'),
        (["time=3"], {}, "run.executor.stop_seconds = 300 must be less than time = 3, 180 s"),
        (["time=0-0", "stop_seconds=0"], {}, 'run.executor.time must be more than 0, got "0-0"'),
        (["time=٣٠"], {}, "run.executor.time must be MINUTES"),
        (["packager=zip"], {}, 'run.executor.packager = "zip" is not known. Known: none, git.'),
        (["devises=2"], {}, 'unknown field "run.executor.devises". Did you mean devices'),
        (["host=login"], {}, "run.executor.host needs user too"),
        (["user=me"], {}, "run.executor.user needs run.executor.host"),
        (['env={"http_proxy": "x"}'], {}, '"http_proxy" is not in capitals; export it in run.executor.setup'),
        (['env={"HF_TOKEN": "hunter2"}'], {}, "run.executor.env: the value of HF_TOKEN would be stored in plain text"),
        (['setup=["export WANDB_API_KEY=hunter2"]'], {}, "run.executor.setup: the value of WANDB_API_KEY would be"),
        (["host=a", "user=b", "job_dir=/c d"], {}, 'run.executor.job_dir = "/c d" has characters that NeMo-Run'),
        (["workdir=/with space"], {}, 'the job cannot run in "/with space": NeMo-Run does not quote'),
        (["partition=a\nb"], {}, "run.executor.partition has two lines"),
        (["container_image="], {}, "run.executor.container_image has no value"),
        (["container_image=x", 'container_mounts=["a"]'], {}, "container_mounts must be SOURCE:TARGET each"),
        (["setup_lines=source secrets"], {}, 'unknown field "run.executor.setup_lines". Did you mean'),
        (["env.A=x"], {}, 'unknown field "run.executor.env.A". It has no fields.'),
        (["job_details.folder=x"], {}, 'unknown field "run.executor.job_details.folder". It has no fields.'),
        (["launcher.nsys=true"], {}, 'unknown field "run.executor.launcher.nsys". Did you mean nsys_trace'),
        (["launcher=ft"], {}, "run.executor.launcher is a section"),
        (["srun_args=3"], {}, "run.executor.srun_args must be list[str] | None"),
        (['container_mounts=["a:b"]'], {}, "run.executor.container_mounts needs container_image"),
        (
            ["devices=2", "container_image=x"],
            {},
            'output_dir = "runs/llama32_3b_to_1b" is relative, and the job runs in',
        ),
        (["devices=2", "host=a", "user=b", "job_dir=/c"], {}, "run.executor.workdir="),
        (["devices=2"], {"data__train": '["no/such"]'}, "data.train: no file /"),
        (["devices=2"], {}, "`sbatch` is not on PATH: run this command on a login node"),
    ],
)
def test_refused_before_anything_is_submitted(inputs, tmp_path, monkeypatch, capfd, fields, overrides, message):
    monkeypatch.chdir(tmp_path)
    nemo_home(monkeypatch, tmp_path / "nemo")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    given = [*shrunk(inputs, **overrides), "run.executor=slurm", *(f"run.executor.{field}" for field in fields)]
    ended = nemo_here(capfd, *LLAMA, *given)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ") and message in ended.err and len(ended.err.splitlines()) == 1
    assert "hunter2" not in ended.err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_only_warns_of_files_that_this_machine_does_not_have(dry):
    elsewhere = {"student__checkpoint": "/no/student", "teacher__checkpoint": "/no/teacher"}
    ended = dry("devices=2", **elsewhere, data__train='["/no/corpus"]', data__valid="[]")
    fields = "student.checkpoint = /no/student, teacher.checkpoint = /no/teacher, data.train = /no/corpus"
    assert ended.err == f"warning: not on this machine, and so not checked: {fields}\n"
    assert "#SBATCH" in ended.out


@pytest.mark.parametrize(
    "line", ["export HF_TOKEN=$(cat ~/.hf)", 'HF_TOKEN="$TOKEN"', "TOKENIZERS_PARALLELISM=false", "source ~/.secrets"]
)
def test_what_is_no_secret_may_be_set_up_and_is_not_traced(tmp_path, line):
    refuse_secrets({"setup": [line]}, "")
    script = tmp_path / "script"
    script.write_text("set -evx\n" + slurm(setup=["X=hunter2", "echo said"]).setup_lines + "\necho traced\n")
    ended = subprocess.run(["bash", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "said\ntraced\n" and "hunter2" not in ended.stderr and "+ echo traced" in ended.stderr


@pytest.mark.parametrize("last", ["echo set up \\", "echo set up #\\", "cat <<END\nset up\nEND"])
def test_the_last_line_of_the_set_up_takes_in_no_line_behind_it(last):
    script = slurm(setup=[last]).setup_lines + "\necho train\n"
    ended = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
    assert ended.stdout == "set up\ntrain\n" and "+ echo train" in ended.stderr


def test_in_python_it_is_nemo_runs_executor():
    executor = slurm(account="nlp", nodes=4, devices=8, time="04:00:00", retries=2)
    assert isinstance(executor, run.SlurmExecutor) and isinstance(executor, run.Executor)
    assert (executor.nnodes(), executor.nproc_per_node(), executor.retries) == (4, 8, 2)
    assert executor.clone() == executor
    with pytest.raises(ValueError, match="nodes must be at least 1, got 0"):
        slurm(nodes=0)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("01:00:00", 3600), ("2-0", 172800), ("1-02:30", 95400), ("1-02:30:15", 95415)],
)
def test_the_formats_of_a_time_limit(time, seconds):
    assert seconds_of(time) == seconds


def test_node_counts_that_fit_are_those_that_check_accepts():
    from distill_nemo.executors import check_launch

    config = RunConfig("/runs/x", StudentConfig(), None)
    config.data.train, config.training.global_batch_size = ["1"], 64
    config.parallelism = ParallelismConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4)
    with pytest.raises(
        ValueError, match=r"3 nodes x 8 devices; with 8 devices a node, run.executor.nodes = 4, 8, 16, 32 fit$"
    ):
        check_launch(config, slurm(nodes=3, devices=8), dryrun=True)
    check_launch(config, slurm(nodes=4, devices=8), dryrun=True)
