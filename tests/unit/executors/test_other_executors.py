"""Recipes run on NeMo-Run's executors that have no name here, as far as can be tested without their clouds."""

from pathlib import Path

import nemo_run as run
import pytest
from nemo_run.core.execution.docker import DockerExecutor
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from distill_nemo.executors import check_launch, run_config_of
from tests.cli.command import nemo_home, the_recipes

COMMON = {"container_image": "registry.io/distill:1", "launcher": "torchrun"}
SIZES = {"nodes": 2, "gpus_per_node": 8, "nprocs_per_node": 8}


def docker():
    return DockerExecutor(num_gpus=8, ntasks_per_node=8, volumes=["/work:/work"], packager=run.Packager(), **COMMON)


def lepton():
    where = {"nemo_run_dir": "/nemo", "mounts": [{"path": "/", "mount_path": "/nemo"}], "node_group": "group"}
    return run.LeptonExecutor(resource_shape="gpu.8xh100", packager=run.Packager(), **where, **SIZES, **COMMON)


def dgx_cloud():
    who = {"client_id": "id", "client_secret": "secret", "project_name": "project"}
    urls = {"base_url": "http://127.0.0.1:9/api", "kube_apiserver_url": "http://127.0.0.1:9"}
    pvc = {"pvc_nemo_run_dir": "/nemo", "pvcs": [{"path": "/nemo"}]}
    return run.DGXCloudExecutor(**pvc, packager=run.Packager(), **urls, **who, **SIZES, **COMMON)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    nemo_home(monkeypatch, tmp_path / "nemo")
    found = the_recipes().llama32_3b_to_1b(teacher="/cluster/teacher", student="/cluster/student")
    found.data.train, found.output_dir = ["/cluster/corpus"], "/cluster/run"
    return found


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (docker, "--nnodes 1 --nproc-per-node 8"),
        (lepton, "--nnodes 2 --nproc-per-node 8"),
        (dgx_cloud, "--nnodes 2 --nproc-per-node 8"),
    ],
)
def test_other_executors_dry_run_offline_with_our_recipe(recipe, make, layout):
    executor = make()
    check_launch(run_config_of(recipe), executor, dryrun=True)
    with run.Experiment("dry", skip_status_at_exit=True) as experiment:
        experiment.add(recipe, executor=executor, name="train")
        experiment.dryrun(log=False, delete_exp_dir=False)
        (job,) = experiment.jobs
        role = job._executable.roles[0]
    command = " ".join([role.entrypoint, *role.args])
    assert command.startswith("torchrun ") and layout in command
    assert command.endswith("-m nemo_run.core.runners.fdl_runner -n train /nemo_run/configs/train_fn_or_script")
    shipped = Path(job.executor.job_dir, "configs", "train_fn_or_script").read_text()
    assert run_config_of(ZlibJSONSerializer().deserialize(shipped)) == run_config_of(recipe)


def test_what_cannot_run_is_refused_before_they_are_asked(recipe):
    recipe.parallelism.tensor_model_parallel_size = 32
    with pytest.raises(ValueError, match=r"You asked for 2 nodes x 8 devices; .*nodes = 4, "):
        check_launch(run_config_of(recipe), dgx_cloud(), dryrun=True)
    recipe.parallelism.tensor_model_parallel_size = 2
    recipe.output_dir = "runs/one"
    with pytest.raises(ValueError, match='output_dir = "runs/one" is relative, and the job runs in a container'):
        check_launch(run_config_of(recipe), docker(), dryrun=True)
