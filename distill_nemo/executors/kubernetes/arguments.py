"""Arguments of the Kubernetes executor, in terms that a cluster's users know; `--dryrun` prints the objects."""

import inspect
import re
from typing import Any

import fiddle as fdl
import nemo_run as run

from distill_nemo.executors.kubernetes.names import LABEL, LABEL_VALUE, NAME, SECRET_KEY
from distill_nemo.executors.kubernetes.trainjob import ADVICE_ON_SECRETS, SINCE, KubernetesExecutor
from distill_nemo.executors.local import ENVIRONMENT
from distill_nemo.executors.secrets import refuse_secrets
from distill_nemo.executors.slurm.arguments import seconds_of
from distill_nemo.fields import typed

STOP_SECONDS = 300  # to finish a step and save
_TAINT = re.compile(r"([^=:]+)(?:=([^:]*))?(?::(NoSchedule|PreferNoSchedule|NoExecute))?")


@typed("run.executor.")
def kubernetes_config(
    image: str = "",
    namespace: str = "default",
    nodes: int = 1,
    devices: int = 1,
    gpus: bool = True,
    cpus: int | None = None,
    memory: str | None = None,
    shared_memory: str | None = "8Gi",
    pvc: str | None = None,
    mount: str = "/workspace",
    pvc_size: str | None = None,
    storage_class: str | None = None,
    env: dict[str, str] | None = None,
    secrets: dict[str, str] | None = None,
    time: str | None = None,
    stop_seconds: int | None = None,
    node_selector: dict[str, str] | None = None,
    tolerations: list[str] | None = None,
    image_pull_secrets: list[str] | None = None,
    service_account: str | None = None,
    labels: dict[str, str] | None = None,
    runtime: str = "torch-distributed",
    trainer_version: str = "2.3",
    context: str | None = None,
) -> run.Config[KubernetesExecutor]:
    """Kubernetes with Kubeflow Trainer: a TrainJob, one pod a node, `devices` ranks each.

    Args:
        image: container image with distill-nemo in it.
        namespace: namespace of the job, its secrets and its volume claims.
        nodes: number of nodes, one pod each.
        devices: ranks per node, one for each GPU.
        gpus: request `devices` GPUs per node (nvidia.com/gpu); false on CPU nodes.
        cpus: CPU cores to request per node.
        memory: memory to request per node, which is also the limit, such as 200Gi.
        shared_memory: limit of /dev/shm, part of the memory; None keeps a container's 64 MiB.
        pvc: claim of a volume that all nodes see, for models, data and the run's output.
        mount: path of the volume in the pods; output_dir must be below it.
        pvc_size: size of the claim to create if there is none, such as 500Gi. It is never deleted.
        storage_class: storage class of a created claim; None is the cluster's default.
        env: environment of the ranks.
        secrets: environment variables from Kubernetes Secrets: NAME to SECRET/KEY. Values are never read here.
        time: limit, in one of SLURM's formats: MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS. Trainer 2.2 or later.
        stop_seconds: seconds that ranks get to save after a request to stop. Trainer 2.3: 300; before, the runtime's.
        node_selector: labels that nodes must have.
        tolerations: taints, as kubectl writes them: KEY=VALUE:EFFECT, KEY:EFFECT, KEY.
        image_pull_secrets: names of Secrets for the image's registry. Trainer 2.1 or later.
        service_account: service account of the pods.
        labels: labels of every object that is created, such as Kueue's queue name.
        runtime: ClusterTrainingRuntime, which also sets how often a pod is restarted.
        trainer_version: version of the cluster's Kubeflow Trainer: 2.0, 2.1, 2.2 or 2.3.
        context: context of the kubeconfig; None is the current one.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    for name, value in (("nodes", nodes), ("devices", devices), ("cpus", cpus), ("stop_seconds", stop_seconds)):
        if value is not None and value < 1:
            raise ValueError(f"run.executor.{name} must be at least 1, got {value}")
    refuse_secrets({"env": env}, ADVICE_ON_SECRETS)
    if stop_seconds is None and trainer_version >= SINCE["stop_seconds"]:
        stop_seconds = STOP_SECONDS
    fields: dict[str, Any] = {
        "image": image,
        "namespace": namespace,
        "num_nodes": nodes,
        "nprocs_per_node": devices,
        "gpus_per_node": devices if gpus else None,
        "cpu_requests": str(cpus) if cpus else None,
        "memory_requests": memory,
        "memory_limits": memory,
        "shared_memory": shared_memory,
        "pvc": pvc,
        "mount": mount.rstrip("/"),
        "pvc_size": pvc_size,
        "storage_class": storage_class,
        "env_vars": _environment(env or {}, nodes, stop_seconds or STOP_SECONDS),
        "env_list": [_secret(name, value) for name, value in (secrets or {}).items()],
        "time": None if time is None else seconds_of(time),
        "stop_seconds": stop_seconds,
        "node_selector": dict(node_selector or {}),
        "tolerations": [_toleration(taint) for taint in tolerations or []],
        "image_pull_secrets": list(image_pull_secrets or []),
        "service_account": service_account,
        "labels": dict(labels or {}),
        "runtime_ref": runtime,
        "trainer_version": trainer_version,
        "context": context,
    }
    KubernetesExecutor(**fields).check()
    return run.Config(KubernetesExecutor, **fields)


def kubernetes(*args: Any, **kwargs: Any) -> run.Executor:
    """Return the executor that `run.executor=kubernetes` names on the command line; takes the same arguments."""
    return fdl.build(kubernetes_config(*args, **kwargs))


kubernetes.__signature__ = inspect.signature(kubernetes_config).replace(  # type: ignore
    return_annotation=run.Executor
)


def _environment(env: dict[str, str], nodes: int, stop_seconds: int) -> dict[str, str]:
    """Return the ranks' environment. Kubernetes would expand $(NAME), so the `$` of `env` are doubled."""
    return {
        **ENVIRONMENT,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(stop_seconds),  # after it torchrun kills ranks that save
        "PYTHONUNBUFFERED": "1",  # or output reaches the log only at the end
        "PET_RDZV_BACKEND": "loopback" if nodes == 1 else "nodes",  # runtime/rendezvous.py
        **{name: str(value).replace("$", "$$") for name, value in env.items()},
    }


def _secret(name: str, value: str) -> dict[str, Any]:
    secret, _, key = value.partition("/")
    if not NAME.fullmatch(secret) or not SECRET_KEY.fullmatch(key):
        raise ValueError(f"run.executor.secrets: {name} must name a Kubernetes Secret and its key, SECRET/KEY")
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _toleration(taint: str) -> dict[str, str]:
    match = _TAINT.fullmatch(taint)
    if match is None or not LABEL.fullmatch(match[1]) or not LABEL_VALUE.fullmatch(match[2] or ""):
        raise ValueError(f'run.executor.tolerations must be KEY=VALUE:EFFECT, KEY:EFFECT or KEY, got "{taint}"')
    key, value, effect = match.groups()
    found = {"key": key, "operator": "Exists" if value is None else "Equal"}
    return {**found, **({} if value is None else {"value": value}), **({"effect": effect} if effect else {})}
