"""Secrets in anything that is written down, recognised by name and by value in every field of our executors."""

import fiddle as fdl
import nemo_run as run
import pytest

from distill_nemo.cli.launch import parse_executor
from distill_nemo.config import RunConfig, StudentConfig
from distill_nemo.executors import check_launch, kubernetes, slurm
from distill_nemo.executors.secrets import is_secret, refuse_secrets

VALUE = "hf_hunter2"
KUBERNETES = ("image=x", "pvc=work")


@pytest.fixture
def exported(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    monkeypatch.setenv("SHORT_TOKEN", "1")


@pytest.mark.parametrize(
    "name",
    "HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY OPENAI_APIKEY ssh_key PGPASSWORD DB_PASS GITHUB_PAT DOCKER_AUTH "
    "GPG_PASSPHRASE AZURE_CREDENTIALS CLIENT_SECRET".split(),
)
def test_secrets_are_recognised_by_name(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    "TOKENIZERS_PARALLELISM NCCL_DEBUG MASTER_PORT KEYBOARD KEY PATH PATTERN AUTHOR BYPASS SSH_PUBLIC_KEY MAX_TOKENS "
    "HF_TOKEN_PATH SSH_AUTH_SOCK GOOGLE_APPLICATION_CREDENTIALS".split(),
)
def test_names_of_what_is_none(name):
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("slurm", ['env={"MY_VAR": "hf_hunter2"}']),
        ("slurm", ["""setup=["curl -H 'Authorization: Bearer hf_hunter2' https://hub"]"""]),
        ("slurm", ['setup=["login --hf-token=another"]']),
        ("slurm", ['env={"MY_VAR": "x-hf_hunter2"}']),
        ("slurm", ['srun_args=["--export=ALL,HF_TOKEN=another"]']),
        ("slurm", ["additional_parameters={'export': 'HF_TOKEN=another'}"]),
        ("slurm", ['container_env=["HF_TOKEN=another"]']),
        ("slurm", ["comment=hf_hunter2"]),
        ("kubernetes", [*KUBERNETES, 'env={"MY_VAR": "hf_hunter2"}']),
        ("kubernetes", [*KUBERNETES, "env_list=[{'name': 'HF_TOKEN', 'value': 'another'}]"]),
        ("kubernetes", [*KUBERNETES, "env_list=[{'name': 'MY_VAR', 'value': 'hf_hunter2'}]"]),
        ("kubernetes", [*KUBERNETES, "annotations={'note': 'hf_hunter2'}"]),
        ("kubernetes", [*KUBERNETES, "volumes=[{'name': 'v', 'csi': {'volumeAttributes': {'k': 'hf_hunter2'}}}]"]),
        ("local", ['env_vars={"HF_TOKEN": "another"}']),
        ("local", ['env_vars={"MY_VAR": "hf_hunter2"}']),
    ],
)
def test_values_of_secrets_are_refused_in_every_field(exported, name, fields):
    field = fields[-1].partition("=")[0]
    config = RunConfig("/workspace/one", StudentConfig())
    with pytest.raises(ValueError, match=rf"^run.executor.{field}: the value of (HF_TOKEN|hf-token) would") as refused:
        check_launch(config, fdl.build(parse_executor(name, fields)), dryrun=True)
    assert "hunter2" not in str(refused.value) and "another" not in str(refused.value)


def test_what_is_no_secret_passes(exported):
    config = RunConfig("/workspace/one", StudentConfig())
    config.data.train = ["1"]
    affinity = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "zone"}]}}
    pods = kubernetes(image="x", pvc="work", secrets={"HF_TOKEN": "hub/token"}, tolerations=["spot"])
    pods.affinity = affinity
    check_launch(config, pods, dryrun=True)
    job = slurm(env={"ONE": "1", "NCCL_DEBUG": "INFO"}, setup=["sort --key=2 file"], container_image="x")
    job.container_env = ["HF_TOKEN"]
    check_launch(config, job, dryrun=True)
    check_launch(config, run.LocalExecutor(env_vars={"HF_TOKEN": ""}), dryrun=True)
    refuse_secrets({"env": None, "setup": None}, "")
