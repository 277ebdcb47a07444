"""Submitted objects have only fields that their cluster has. Refusals and jobs that cannot start are reported."""

import re

import pytest

from distill_nemo.executors import kubernetes
from tests.cli.command import nemo_here, nemo_home
from tests.launch.kubernetes import api
from tests.launch.kubernetes.conftest import ONE_NODE, Stage
from tests.launch.kubernetes.schemas import TRAINERS, Schemas, fetch

COMMAND = ["python", "-m", "distill_nemo", "/nemo_run/configs/train.yaml"]
EVERYWHERE = {
    "image": "registry.io/distill:1",
    "nodes": 2,
    "devices": 8,
    "cpus": 64,
    "memory": "400Gi",
    "pvc": "work",
    "pvc_size": "1Ti",
    "storage_class": "fast",
    "env": {"NCCL_DEBUG": "INFO"},
    "secrets": {"HF_TOKEN": "hub/token"},
    "node_selector": {"gpu": "h100"},
    "tolerations": ["gpu=a100:NoSchedule", "spot"],
    "service_account": "trainer",
    "labels": {"kueue.x-k8s.io/queue-name": "nlp"},
}
LATER = {"2.1": {"image_pull_secrets": ["registry"]}, "2.2": {"time": "2-0"}, "2.3": {"stop_seconds": 60}}


@pytest.fixture(scope="module")
def schemas():
    fetch()
    return {version: Schemas(version) for version in TRAINERS}


def everything(tmp_path, version):
    """Return the objects of a run that sets everything its Trainer supports."""
    more = {name: value for first, fields in LATER.items() if first <= version for name, value in fields.items()}
    executor = kubernetes(trainer_version=version, **EVERYWHERE, **more)
    executor.job_dir = str(tmp_path)
    (tmp_path / "configs").mkdir(exist_ok=True)
    (tmp_path / "configs" / "train.yaml").write_text("output_dir: /workspace/one\n")
    return executor.manifests("train-1", COMMAND)


@pytest.mark.parametrize("version", TRAINERS)
def test_every_field_is_known_to_its_trainer_and_to_kubernetes(schemas, tmp_path, version):
    objects = everything(tmp_path, version)
    assert [each["kind"] for each in objects] == ["PersistentVolumeClaim", "ConfigMap", "TrainJob"]
    assert [schemas[version].errors(each) for each in objects] == [[], [], []]


@pytest.mark.parametrize(
    ("version", "cluster", "unknown"),
    [
        ("2.0", "2.1", "podSpecOverrides"),
        ("2.1", "2.0", "podTemplateOverrides"),
        ("2.1", "2.3", "podTemplateOverrides"),
        ("2.3", "2.1", "runtimePatches"),
        ("2.2", "2.1", "activeDeadlineSeconds"),
        ("2.3", "2.2", "terminationGracePeriodSeconds"),
    ],
)
def test_another_trainers_fields_are_not(schemas, tmp_path, version, cluster, unknown):
    errors = schemas[cluster].errors(everything(tmp_path, version)[-1])
    assert any(error.startswith("unknown field") and error.endswith(f'{unknown}"') for error in errors), errors


def test_values_are_looked_at_too(schemas, tmp_path):
    claim, files, job = everything(tmp_path, "2.3")
    job["spec"]["trainer"]["numNodes"] = "two"
    claim["spec"]["accessModes"] = "ReadWriteMany"
    files["data"]["train.yaml"] = {"output_dir": "/workspace/one"}
    for each in (claim, files, job):
        assert schemas["2.3"].errors(each), each


@pytest.fixture
def here(clusters, tmp_path, monkeypatch, capfd):
    """Return a function that runs `nemo distill train` on a cluster, detached, in this process; then a command."""

    def run(trainer, *arguments, **overrides):
        stage = Stage(clusters[trainer], "here", tmp_path)
        nemo_home(monkeypatch, tmp_path / "nemo")
        monkeypatch.setenv("KUBECONFIG", stage.cluster.environment["KUBECONFIG"])
        before = set(stage.cluster.objects)
        ended = nemo_here(capfd, *stage.arguments(*ONE_NODE, "--detach", *arguments, **overrides))
        return ended, {
            key for key in set(stage.cluster.objects) - before if key[0] not in ("Pod", "PersistentVolumeClaim")
        }

    def output_of(command):
        (experiment,) = (path.name for path in tmp_path.glob("nemo/experiments/train/*"))
        return nemo_here(capfd, command, f"experiment={experiment}")

    run.output_of, run.left = output_of, lambda: list(tmp_path.glob("nemo/experiments/*/*"))
    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run.executor.trainer_version=2.1"],
            'refused the TrainJob: strict decoding error: unknown field "spec.podTemplateOverrides"; '
            "is its Trainer 2.1, as run.executor.trainer_version says?",
        ),
        (["run.executor.runtime=no-such"], "refused the TrainJob: runtime no-such must be created before the TrainJob"),
        (["run.executor.namespace=no-such"], 'refused the PersistentVolumeClaim: namespaces "no-such" not found'),
    ],
)
def test_what_a_cluster_refuses_is_reported_and_nothing_is_left(here, arguments, message):
    ended, created = here("2.3", *arguments)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == f"error: Kubernetes {message}\n"
    assert not created and not here.left()


def test_a_cluster_without_trainer_is_refused(here, monkeypatch):
    monkeypatch.setattr(api, "TRAINER", re.compile("$^"))
    ended, created = here("2.3")
    message = (
        "refused the TrainJob: the server could not find the requested resource; is Kubeflow Trainer installed on it?"
    )
    assert (ended.code, ended.err) == (1, f"error: Kubernetes {message}\n") and not created


def test_files_that_are_refused_take_the_job_with_them(here, clusters, monkeypatch):
    refusing = clusters["2.3"].schemas.errors
    only = lambda each: ['unknown field "x"'] if each["kind"] == "ConfigMap" else refusing(each)  # noqa: E731
    monkeypatch.setattr(clusters["2.3"].schemas, "errors", only)
    ended, created = here("2.3")
    assert ended.code == 1 and "refused the ConfigMap" in ended.err
    assert not created and not here.left()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.executor.gpus=true"], "Unschedulable: 0/2 nodes are available: 2 Insufficient nvidia.com/gpu."),
        (['run.executor.secrets={"A": "gone/key"}'], "CreateContainerConfigError: secret "),
    ],
)
def test_what_does_not_start_is_reported_by_status(here, arguments, message):
    ended, created = here("2.3", *arguments)
    assert (ended.code, ended.err) == (0, "") and {kind for kind, *_ in created} == {"TrainJob", "ConfigMap"}
    while message not in (status := here.output_of("status")).out:
        assert (status.code, status.err) == (0, "") and "Pending" in status.out, status
    assert here.output_of("cancel").code == 0
    after = here.output_of("status")
    while after.code == 0:
        assert "Deleting" in after.out
        after = here.output_of("status")
    assert "Deleted" in after.out and "the TrainJob was deleted" in after.err
