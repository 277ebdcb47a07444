"""Objects that a dry run of `run.executor=kubernetes` prints, without a cluster, and refusals.

Tests on clusters of three versions of Trainer, with their schemas, are in tests/launch/kubernetes.
"""

import os
import re

import fiddle as fdl
import nemo_run as run
import pytest
import yaml
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from distill_nemo.cli import commands
from distill_nemo.config import ParallelismConfig, RunConfig, StudentConfig
from distill_nemo.config_files import from_dict, load_yaml
from distill_nemo.executors import WatchedExperiment, kubernetes, run_config_of
from distill_nemo.executors.kubernetes.trainjob import PATCHES, under_torchrun
from distill_nemo.teacher_store_jobs.entry import teacher
from tests.cli.command import nemo_here, nemo_home, shrunk, the_recipes

LLAMA = ("train", "--factory", "llama32_3b_to_1b")
LEAST = ("image=registry.io/distill:1", "devices=2", "pvc=work")
OUTPUT = {"output_dir": "/workspace/runs/one"}


@pytest.fixture(autouse=True)
def no_cluster(tmp_path, monkeypatch):
    """Remove kubeconfig and service account, and change to an empty directory."""
    monkeypatch.chdir(tmp_path)
    nemo_home(monkeypatch, tmp_path / "nemo")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


def given(tmp_path, *fields, **overrides):
    """Return the arguments of a command whose paths are on the volume."""
    arguments = shrunk(tmp_path.__class__("/workspace"), **{**OUTPUT, **overrides})
    return [*LLAMA, *arguments, "run.executor=kubernetes", *(f"run.executor.{field}" for field in fields)]


@pytest.fixture
def dry(tmp_path, capfd):
    """Return a function that does a dry run with further fields and returns the printed objects by kind."""

    def objects(*fields, **overrides):
        ended = nemo_here(capfd, *given(tmp_path, *fields, **overrides), "--dryrun")
        assert (ended.code, ended.err) == (0, ""), ended.err
        assert not list(tmp_path.glob("nemo/experiments/*/*"))
        return {each["kind"]: each for each in yaml.safe_load_all(ended.out)}

    return objects


def patched(job, version):
    """Return the pod spec that a TrainJob asks for, in whichever field its Trainer version has it."""
    (patch,) = job["spec"][PATCHES[version]]
    assert not set(PATCHES.values()) - {PATCHES[version]} & set(job["spec"])
    if version == "2.0":
        assert patch["targetJobs"] == [{"name": "node"}]
        return patch
    if version == "2.1":
        assert patch["targetJobs"] == [{"name": "node"}] and set(patch) == {"targetJobs", "spec"}
        return patch["spec"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert (patch["manager"], node["name"]) == ("distill-nemo/launcher", "node")
    return node["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", PATCHES)
def test_pods_are_patched_as_their_trainer_wants_it(dry, version):
    job = dry(*LEAST, f"trainer_version={version}", 'tolerations=["gpu=a100:NoSchedule", "spot"]')["TrainJob"]
    pod = patched(job, version)
    assert pod["tolerations"] == [
        {"key": "gpu", "operator": "Equal", "value": "a100", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists"},
    ]
    name = job["metadata"]["name"]
    items = [{"key": "train.yaml", "path": "configs/train.yaml"}]
    assert pod["volumes"] == [
        {"name": "files", "configMap": {"name": name, "items": items}},
        {"name": "work", "persistentVolumeClaim": {"claimName": "work"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
    ]
    (container,) = pod["containers"]
    assert container["name"] == "node" and set(container) == {"name", "volumeMounts"}
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/nemo_run", "/workspace", "/dev/shm"]
    assert pod.get("terminationGracePeriodSeconds") == (300 if version == "2.3" else None)


def test_every_argument_is_in_the_objects(dry):
    found = dry(
        "image=registry.io/distill:1",
        "namespace=research",
        "nodes=2",
        "devices=4",
        "cpus=32",
        "memory=400Gi",
        "shared_memory=64Gi",
        "pvc=work",
        "mount=/workspace/",
        "pvc_size=2Ti",
        "storage_class=fast",
        'env={"NCCL_DEBUG": "INFO", "WORDS": "two words", "TOKENIZERS_PARALLELISM": "0"}',
        'secrets={"HF_TOKEN": "hub/token"}',
        "time=1-02:30",
        "stop_seconds=90",
        'node_selector={"gpu": "h100"}',
        'image_pull_secrets=["registry"]',
        "service_account=trainer",
        'labels={"kueue.x-k8s.io/queue-name": "nlp"}',
        "runtime=ours",
        parallelism__tensor_model_parallel_size=4,
    )
    about = {"namespace": "research", "labels": {"kueue.x-k8s.io/queue-name": "nlp"}}
    claim, job = found["PersistentVolumeClaim"], found["TrainJob"]
    assert claim["metadata"] == {"name": "work", **about}
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "2Ti"}},
        "storageClassName": "fast",
    }
    for each in (job, found["ConfigMap"]):
        assert {key: each["metadata"][key] for key in about} == about
    spec, trainer = job["spec"], job["spec"]["trainer"]
    assert (spec["runtimeRef"], spec["activeDeadlineSeconds"]) == ({"name": "ours"}, 95400)
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("registry.io/distill:1", 2, 4)
    assert trainer["command"] == ["torchrun", "--tee", "3", "-m", "distill_nemo", "/nemo_run/configs/train.yaml"]
    assert trainer["resourcesPerNode"] == {
        "limits": {"memory": "400Gi", "nvidia.com/gpu": "4"},
        "requests": {"cpu": "32", "memory": "400Gi", "nvidia.com/gpu": "4"},
    }
    env = {each["name"]: each.get("value", each.get("valueFrom")) for each in trainer["env"]}
    assert (env["NCCL_DEBUG"], env["WORDS"], env["PYTHONUNBUFFERED"]) == ("INFO", "two words", "1")
    assert env["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"
    pod = patched(job, "2.3")
    assert pod["nodeSelector"] == {"gpu": "h100"} and pod["serviceAccountName"] == "trainer"
    assert pod["imagePullSecrets"] == [{"name": "registry"}] and pod["terminationGracePeriodSeconds"] == 90
    assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == [
        "/nemo_run",
        "/workspace",
        "/dev/shm",
    ]
    assert pod["volumes"][2]["emptyDir"]["sizeLimit"] == "64Gi"


def test_the_file_that_is_shipped_is_the_recipe(dry, tmp_path):
    (text,) = dry(*LEAST, distillation__temperature=3.5)["ConfigMap"]["data"].values()
    (tmp_path / "config.yaml").write_text(text)
    config = load_yaml(tmp_path / "config.yaml")
    assert (config.output_dir, config.distillation.temperature) == ("/workspace/runs/one", 3.5)
    assert config == from_dict(yaml.safe_load(text))


def test_the_least_a_user_says(dry):
    found = dry(*LEAST, "gpus=false", "shared_memory=null")
    assert set(found) == {"ConfigMap", "TrainJob"}, "a claim is made only if its size is given"
    spec = found["TrainJob"]["spec"]
    assert "resourcesPerNode" not in spec["trainer"] and "activeDeadlineSeconds" not in spec
    assert re.fullmatch(r"train-[0-9a-f]{6}", found["TrainJob"]["metadata"]["name"])


@pytest.mark.parametrize(
    ("fields", "overrides", "message"),
    [
        (["devices=2"], {}, 'run.executor.image must name a container image with distill-nemo in it, got ""'),
        ([*LEAST, "nodes=0"], {}, "run.executor.nodes must be at least 1, got 0"),
        ([*LEAST, "devises=2"], {}, 'unknown field "run.executor.devises". Did you mean devices'),
        ([*LEAST, "trainer_version=1.9"], {}, 'run.executor.trainer_version = "1.9" is not known.'),
        ([*LEAST, "trainer_version=2.1", "time=90"], {}, "run.executor.time needs Trainer 2.2"),
        ([*LEAST, "trainer_version=2.2", "stop_seconds=60"], {}, "run.executor.stop_seconds needs Trainer 2.3"),
        (
            [*LEAST, "trainer_version=2.0", 'image_pull_secrets=["a"]'],
            {},
            "run.executor.image_pull_secrets needs Trainer 2.1, and run.executor.trainer_version is 2.0: there, set it "
            "in the runtime (torch-distributed)",
        ),
        ([*LEAST, "time=soon"], {}, "run.executor.time must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS"),
        ([*LEAST, "memory=lots"], {}, 'run.executor.memory must be a quantity such as 64Gi, got "lots"'),
        ([*LEAST, "namespace=My_Space"], {}, "run.executor.namespace must be a Kubernetes name"),
        ([*LEAST, "mount=work"], {}, "run.executor.mount must be an absolute path"),
        ([*LEAST, "mount=/nemo_run/x"], {}, "run.executor.mount must be an absolute path, not below /nemo_run"),
        (["image=x", "devices=2", "pvc_size=1Ti"], {}, "run.executor.pvc_size needs pvc"),
        ([*LEAST, "storage_class=fast"], {}, "run.executor.storage_class needs pvc_size"),
        ([*LEAST, 'secrets={"HF_TOKEN": "hub"}'], {}, "HF_TOKEN must name a Kubernetes Secret and its key, SECRET/KEY"),
        (
            [*LEAST, 'env={"HF_TOKEN": "x"}'],
            {},
            """a Kubernetes Secret: run.executor.secrets='{"HF_TOKEN": "SECRET/KEY"}'""",
        ),
        (
            [*LEAST, 'env={"AWS_SECRET_ACCESS_KEY": "x"}'],
            {},
            "the value of AWS_SECRET_ACCESS_KEY would be stored in plain text",
        ),
        ([*LEAST, "nprocs_per_node=0"], {}, "run.executor: 1 nodes x 0 ranks; both must be at least 1"),
        ([*LEAST, "env_list=[1]"], {}, "run.executor.env_list must be list[dict[str, Any]], got '[1]'"),
        (LEAST, {"output_dir": "/workspace/../x"}, "would be lost with the pods: it must be below /workspace"),
        ([*LEAST, 'env={"PET_NNODES": "2"}'], {}, '"PET_NNODES" is set by Trainer'),
        ([*LEAST, 'tolerations=["a b"]'], {}, "run.executor.tolerations must be KEY=VALUE:EFFECT"),
        ([*LEAST, 'tolerations=["a/b/c"]'], {}, "run.executor.tolerations must be KEY=VALUE:EFFECT"),
        ([*LEAST, "time=0"], {}, 'run.executor.time must be more than 0, got "0"'),
        ([*LEAST, "pvc_size=0Gi"], {}, "run.executor.pvc_size must be a quantity such as 64Gi"),
        ([*LEAST, "mount=/a:b"], {}, "run.executor.mount must be an absolute path"),
        ([*LEAST, "namespace=my.space"], {}, "run.executor.namespace must be a Kubernetes name of at most 63 letters"),
        ([*LEAST, f"namespace={'a' * 64}"], {}, "run.executor.namespace must be a Kubernetes name of at most 63"),
        ([*LEAST, "pvc=a..b"], {}, "run.executor.pvc must be a Kubernetes name"),
        ([*LEAST, f"pvc={'a' * 254}"], {}, "run.executor.pvc must be a Kubernetes name"),
        ([*LEAST, "pvc_size=1Ti", "storage_class=Fast"], {}, "run.executor.storage_class must be a Kubernetes name"),
        ([*LEAST, 'image_pull_secrets=["A b"]'], {}, "run.executor.image_pull_secrets must be a Kubernetes name"),
        ([*LEAST, 'secrets={"A": "a..b/c"}'], {}, "A must name a Kubernetes Secret and its key"),
        ([*LEAST, 'env={"1A": "x"}'], {}, 'run.executor.env: "1A" is not the name of an environment variable'),
        ([*LEAST, 'env={"A": "x"}', 'secrets={"A": "a/b"}'], {}, 'run.executor.secrets: "A" is set twice'),
        ([*LEAST, 'secrets={"PET_NNODES": "a/b"}'], {}, 'run.executor.secrets: "PET_NNODES" is set by Trainer'),
        ([*LEAST, 'labels={"a b": "x"}'], {}, 'run.executor.labels: "a b" is not the key of a label'),
        ([*LEAST, 'labels={"a": "x y"}'], {}, "run.executor.labels: a must be at most 63 letters"),
        ([*LEAST, f'node_selector={{"a": "{"x" * 64}"}}'], {}, "run.executor.node_selector: a must be at most 63"),
        ([*LEAST, "volume_mounts=[{'name': 'a'}]"], {}, "run.executor.volume_mounts: each needs name and mountPath"),
        ([*LEAST, "retries=3"], {}, "run.executor.retries is not supported on Kubernetes: the runtime's backoffLimit"),
        ([*LEAST, "nodes=3", "devices=1"], {}, "with 1 devices a node, run.executor.nodes = 2, 4 fit"),
        (LEAST, {"output_dir": "runs/x"}, 'output_dir = "runs/x" is relative, and the job runs in a container'),
        (LEAST, {"output_dir": "/runs/x"}, "would be lost with the pods: it must be below /workspace"),
        (["image=x", "devices=2"], {}, "it must be below a volume: run.executor.pvc=, mounted at /workspace"),
        (LEAST, {}, "no Kubernetes cluster: "),
    ],
)
def test_refused_before_anything_is_submitted(tmp_path, capfd, fields, overrides, message):
    ended = nemo_here(capfd, *given(tmp_path, *fields, **overrides))
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ") and message in ended.err and len(ended.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_does_not_answer(tmp_path, monkeypatch, capfd):
    user, cluster = {"name": "me", "user": {}}, {"name": "here", "cluster": {"server": "http://127.0.0.1:9"}}
    context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
    config = {"clusters": [cluster], "users": [user], "contexts": [context], "current-context": "here"}
    (tmp_path / "config").write_text(yaml.dump({"apiVersion": "v1", "kind": "Config", **config}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    ended = nemo_here(capfd, *given(tmp_path, *LEAST))
    assert ended.code == 1 and ended.err.startswith("error: Kubernetes does not answer: "), ended
    assert not list(tmp_path.glob("nemo/experiments/*/*"))


def test_what_must_be_in_the_image_is_reported(tmp_path, capfd):
    ended = nemo_here(capfd, *given(tmp_path, *LEAST, teacher__checkpoint="/models/big"), "--dryrun")
    message = "warning: not below /workspace, so they must be in the image: teacher.checkpoint = /models/big\n"
    assert (ended.code, ended.err) == (0, message)


def test_in_python_it_is_nemo_runs_executor():
    executor = kubernetes(image="x", nodes=4, devices=8, pvc="work", time="04:00:00")
    assert isinstance(executor, run.KubeflowExecutor) and (executor.nnodes(), executor.nproc_per_node()) == (4, 8)
    assert executor.clone() == executor
    with pytest.raises(ValueError, match="nodes must be at least 1, got 0"):
        kubernetes(image="x", nodes=0)


def test_scripts_and_other_functions_are_shipped_too(capfd):
    executor = kubernetes(image="x", nodes=2, pvc="work")
    with WatchedExperiment.titled("mixed") as experiment:
        experiment.add(run.Script(inline="echo $RANK"), executor=executor, name="shell")
        experiment.add(run.Partial(os.makedirs, name="x"), executor=executor.clone(), name="1b")
        experiment.show()
    first, job, second, other = yaml.safe_load_all(capfd.readouterr().out)
    assert first["data"] == {"shell.sh": "#!/usr/bin/bash\necho $RANK"}
    assert job["spec"]["trainer"]["command"][3:] == ["--no-python", "bash", "/nemo_run/scripts/shell.sh"]
    (name,) = second["data"]
    assert other["spec"]["trainer"]["command"][3:5] == ["-m", "nemo_run.core.runners.fdl_runner"]
    assert other["spec"]["trainer"]["command"][-1] == f"/nemo_run/configs/{name}"
    assert other["metadata"]["name"].startswith("run-1b-"), "a DNS label begins with a letter"


def test_variables_of_nemo_runs_torchrun_are_those_of_the_pod():
    assert under_torchrun(["torchrun", "--rdzv-endpoint=$PET_MASTER_ADDR:29500"])[1].endswith(
        "$(PET_MASTER_ADDR):29500"
    )


def test_a_recipe_that_is_no_run_is_refused():
    with pytest.raises(ValueError, match="student is not set"):
        run_config_of(fdl.Partial(RunConfig, output_dir="/x"))
    assert run_config_of(fdl.Partial(RunConfig, output_dir="/x", student=StudentConfig())).output_dir == "/x"
    assert the_recipes()


def test_names_that_kubernetes_takes():
    long = f"{'a' * 126}.{'b' * 126}"
    labels = {f"{long}/{'c' * 63}": "x_Y.1", "a": ""}
    made = kubernetes(
        image="x", namespace="n" * 63, pvc=long, secrets={"A": f"{long}/.k"}, env={".a-b": ""}, labels=labels
    )
    assert (made.pvc, made.labels) == (long, labels)


def test_kubernetes_expands_nothing_in_the_environment():
    executor = kubernetes(image="x", env={"A": "$(HOME) $$ $x", "B": "plain"})
    assert (executor.env_vars["A"], executor.env_vars["B"]) == ("$$(HOME) $$$$ $$x", "plain")


def test_pods_that_write_a_store(tmp_path, capfd):
    arguments = ["teacher", "teacher.checkpoint=/workspace/teacher", 'data.train=["/workspace/corpus"]', "--dryrun"]
    arguments += ["windows=64", "run.executor=kubernetes", "run.executor.nodes=4"]
    arguments += [f"run.executor.{field}" for field in LEAST]
    ended = nemo_here(capfd, *arguments, "output=/workspace/store")
    assert (ended.code, ended.err) == (0, "")
    files, job = yaml.safe_load_all(ended.out)
    (shipped,) = files["data"].values()
    task = ZlibJSONSerializer().deserialize(shipped)
    assert (task.__fn_or_cls__, task.output, task.windows) == (teacher, "/workspace/store", 64)
    assert job["spec"]["trainer"]["numNodes"] == 4
    ended = nemo_here(capfd, *arguments, "output=store")
    assert ended.code == 1 and ended.err.startswith('error: output = "store" is relative')


def test_pods_that_export(tmp_path, capfd):
    arguments = ["export", "checkpoint=/workspace/run", "run.executor=kubernetes", "--dryrun"]
    arguments += [f"run.executor.{field}" for field in LEAST]
    ended = nemo_here(capfd, *arguments, "output=/workspace/student", "parallelism.tensor_model_parallel_size=2")
    assert (ended.code, ended.err) == (0, "")
    files, job = yaml.safe_load_all(ended.out)
    (shipped,) = files["data"].values()
    export = ZlibJSONSerializer().deserialize(shipped)
    assert export == run.Partial(
        commands.export,
        checkpoint="/workspace/run",
        output="/workspace/student",
        parallelism=run.Config(ParallelismConfig, tensor_model_parallel_size=2),
    )
    assert job["spec"]["trainer"]["command"][-1] == f"/nemo_run/configs/{next(iter(files['data']))}"
    for output, refused in (
        ("student", 'output = "student" is relative'),
        ("/x", 'output = "/x" would be lost with the pods'),
    ):
        ended = nemo_here(capfd, *arguments, f"output={output}")
        assert ended.code == 1 and ended.err.startswith(f"error: {refused}")
