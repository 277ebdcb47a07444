"""Kubernetes objects of a run: a TrainJob of Kubeflow Trainer, the files that its pods read, and a volume claim."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo_run.core.execution.kubeflow import KubeflowExecutor, KubeflowJobState
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from nemo_run.run.torchx_backend.schedulers.api import EXECUTOR_MAPPING

from distill_nemo.config_files import save_yaml
from distill_nemo.executors.kubernetes.api import Refused, connected, created
from distill_nemo.executors.kubernetes.jobs import KubernetesJob
from distill_nemo.executors.kubernetes.names import check_labels, check_names, check_variables
from distill_nemo.executors.secrets import refuse_secrets
from distill_nemo.executors.watch.jobs import UnseenError
from distill_nemo.executors.worker_config import run_config_of
from distill_nemo.fields import suggest
from distill_nemo.training.entry import distill

FILES_ROOT = "/nemo_run"  # where the pods find the shipped files, named as NeMo-Run does
MAX_BYTES = 1_000_000  # of a ConfigMap
CONTAINER = "node"  # name of the container, and of the replicated job, in Trainer's runtimes
MANAGER = "distill-nemo/launcher"  # author of a patch, which Trainer 2.2 requires
PATCHES = {
    "2.0": "podSpecOverrides",
    "2.1": "podTemplateOverrides",
    "2.2": "runtimePatches",
    "2.3": "runtimePatches",
}
SINCE = {  # the first Trainer whose TrainJob has such a field; before, only its runtime has
    "image_pull_secrets": "2.1",
    "affinity": "2.1",
    "pod_labels": "2.1",
    "pod_annotations": "2.1",
    "time": "2.2",
    "stop_seconds": "2.3",
}
ADVICE_ON_SECRETS = """put it into a Kubernetes Secret: run.executor.secrets='{"NAME": "SECRET/KEY"}'"""
RUNNER = "nemo_run.core.runners.fdl_runner"


@dataclass(kw_only=True)
class KubernetesExecutor(KubeflowExecutor):
    """NeMo-Run's executor for every version of Trainer, which connects to the cluster only to submit.

    NeMo-Run's own connects when it is made, copies files with kubectl, and patches pods as only Trainer 2.1 does.
    """

    trainer_version: str = "2.3"
    pvc: str | None = None
    mount: str = "/workspace"
    pvc_size: str | None = None
    storage_class: str | None = None
    is_shared: bool = False  # set by the launcher: pods of another job mount the claim, too
    shared_memory: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    service_account: str | None = None
    time: int | None = None  # seconds
    stop_seconds: int | None = None
    context: str | None = None

    def __post_init__(self) -> None:
        """Register the class with NeMo-Run, without a connection."""
        _register()
        self._kube_clients_loaded_at = float("-inf")  # old, so that NeMo-Run loads the clients at first use

    def check(self) -> None:
        """Refuse fields that cannot work.

        Raises:
            ValueError: naming the field, what came, what is allowed.
        """
        refuse_secrets(vars(self), ADVICE_ON_SECRETS)
        if self.trainer_version not in PATCHES:
            known = suggest(self.trainer_version, PATCHES)
            raise ValueError(f'run.executor.trainer_version = "{self.trainer_version}" is not known.{known}')
        for name, first in SINCE.items():
            if getattr(self, name) and self.trainer_version < first:
                raise ValueError(
                    f"run.executor.{name} needs Trainer {first}, and run.executor.trainer_version is "
                    f"{self.trainer_version}: there, set it in the runtime ({self.runtime_ref})"
                )
        for name, instead in (
            ("retries", "the runtime's backoffLimit sets how often a pod is started again"),
            ("workdir_pvc", "use pvc"),
            ("workdir_local_path", "files must be in the image or on the pvc"),
        ):
            if getattr(self, name):
                raise ValueError(f"run.executor.{name} is not supported on Kubernetes: {instead}")
        check_names(self)
        check_variables(self)
        check_labels(self)
        self._check_volumes()

    def _check_volumes(self) -> None:
        for name in ("pvc_size", "storage_class"):
            if getattr(self, name) is not None and self.pvc is None:
                raise ValueError(f"run.executor.{name} needs pvc, the name of the claim to make")
        if self.storage_class is not None and self.pvc_size is None:
            raise ValueError("run.executor.storage_class needs pvc_size: without it, no claim is made")
        ours = (f"{FILES_ROOT}/", "/dev/shm/")
        if not re.fullmatch(r"(/[^/:]+)+", self.mount) or f"{self.mount}/".startswith(ours):
            raise ValueError(
                f'run.executor.mount must be an absolute path, not below {FILES_ROOT} or /dev/shm, got "{self.mount}"'
            )
        for each in self.volume_mounts:
            if not {"name", "mountPath"} <= each.keys():
                raise ValueError(f"run.executor.volume_mounts: each needs name and mountPath, got {each}")

    @property
    def mounts(self) -> list[str]:
        """Paths in the pods of volumes that outlive them."""
        return [self.mount] * (self.pvc is not None) + [mount["mountPath"] for mount in self.volume_mounts]

    def package_configs(self, *cfgs: tuple[str, str]) -> list[str]:
        """Package as NeMo-Run does, but ship our recipes as plain config, and return paths in the pods."""
        paths = []
        for name, text in cfgs:
            recipe = ZlibJSONSerializer().deserialize(text) if name.endswith("_fn_or_script") else None
            if isinstance(recipe, fdl.Partial) and recipe.__fn_or_cls__ is distill:
                name = f"{name.removesuffix('_fn_or_script')}.yaml"
                save_yaml(run_config_of(recipe), Path(self.job_dir, "configs", name))
            else:
                super().package_configs((name, text))
            paths.append(f"{FILES_ROOT}/configs/{name}")
        return paths

    def get_job_body(self, name: str, command: list[str]) -> dict[str, Any]:
        """Return the TrainJob."""
        body = super().get_job_body(name, under_torchrun(command))
        spec = body["spec"]
        patch = spec.pop("podTemplateOverrides", [{}])[0]
        pod = {**patch.get("spec", {})}
        volumes, mounts = self._volumes(name, command)
        if volumes:
            pod["volumes"] = [*self.volumes, *volumes]
            pod["containers"] = [{"name": CONTAINER, "volumeMounts": [*self.volume_mounts, *mounts]}]
        for field_name, value in (
            ("nodeSelector", self.node_selector),
            ("serviceAccountName", self.service_account),
            ("terminationGracePeriodSeconds", self.stop_seconds),
        ):
            if value:
                pod[field_name] = value
        if self.time:
            spec["activeDeadlineSeconds"] = self.time
        template = {name: value for name, value in (("metadata", patch.get("metadata")), ("spec", pod)) if value}
        if template:
            spec[PATCHES[self.trainer_version]] = [_patch(self.trainer_version, template)]
        return body

    def _volumes(self, name: str, command: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the volumes of a pod, and the paths at which its container sees them."""
        volumes, mounts = [], []
        if files := self._shipped(command):
            items = [{"key": Path(path).name, "path": path} for path in files]
            volumes.append({"name": "files", "configMap": {"name": name, "items": items}})
            mounts.append({"name": "files", "mountPath": FILES_ROOT, "readOnly": True})
        if self.pvc is not None:
            volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": self.pvc}})
            mounts.append({"name": "work", "mountPath": self.mount})
        if self.shared_memory is not None:
            volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shared_memory}})
            mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        return volumes, mounts

    def _shipped(self, command: list[str]) -> dict[str, str]:
        """Return the text of each file that `command` names, by its path below `FILES_ROOT`."""
        paths = [word.removeprefix(f"{FILES_ROOT}/") for word in command if word.startswith(f"{FILES_ROOT}/")]
        files = {path: Path(self.job_dir, path).read_text() for path in paths if Path(self.job_dir, path).is_file()}
        if (size := sum(map(len, files.values()))) > MAX_BYTES:
            raise ValueError(
                f"a ConfigMap holds {MAX_BYTES} bytes, and {', '.join(files)} have {size}: put them on the pvc"
            )
        return files

    def manifests(self, name: str, command: list[str]) -> list[dict[str, Any]]:
        """Return all objects to submit: the claim and the files, if there are any, then the TrainJob."""
        self.check()
        about: dict[str, Any] = {"namespace": self.namespace}
        if self.labels:
            about["labels"] = self.labels
        objects: list[dict[str, Any]] = []
        if self.pvc_size is not None:
            spec = {
                "accessModes": ["ReadWriteMany" if self.num_nodes > 1 or self.is_shared else "ReadWriteOnce"],
                "resources": {"requests": {"storage": self.pvc_size}},
            }
            if self.storage_class is not None:
                spec["storageClassName"] = self.storage_class
            metadata = {"name": self.pvc, **about}
            objects.append({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
        if files := self._shipped(command):
            data = {Path(path).name: text for path, text in files.items()}
            objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **about}, "data": data})
        return [*objects, self.get_job_body(name, command)]

    # NeMo-Run's interface of an executor

    def _load_kube_clients(self) -> None:
        self._co_api, self._cv_api = connected(self.context)
        self._kube_clients_loaded_at = time.monotonic()

    def _trainjob_name(self, fallback: str) -> str:
        """Return the job's name, which must begin with a letter, as a DNS label does."""
        return super()._trainjob_name(fallback if fallback[:1].isalpha() else f"run-{fallback}")

    def launch(self, name: str, cmd: list[str], **_: Any) -> tuple[str, KubeflowJobState]:
        """Submit all objects and return the TrainJob's name.

        Raises:
            ValueError: if Kubernetes refuses one, with its message.
        """
        name = self._trainjob_name(name)
        *before, job = self.manifests(name, cmd)
        claims = [each for each in before if each["kind"] == "PersistentVolumeClaim"]
        for claim in claims:
            created(self, claim, exist_ok=True)
        owner = created(self, job)
        reference = {key: owner[key] for key in ("apiVersion", "kind")}
        reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
        try:  # pods wait for their files, which are deleted with the job
            for each in before[len(claims) :]:
                each["metadata"]["ownerReferences"] = [reference]
                created(self, each)
        except Refused:
            self.cancel(name)
            raise
        return name, KubeflowJobState.CREATED

    def status(self, job_name: str) -> KubeflowJobState | None:
        """Return NeMo-Run's state of a job; None if it is not known now. A deleted job counts as failed."""
        try:
            state = KubernetesJob.named(self, job_name).state()
        except UnseenError:
            return None
        if state.completed:
            return KubeflowJobState.SUCCEEDED
        if state.ended:
            return KubeflowJobState.FAILED
        return KubeflowJobState.RUNNING if state.name == "Running" else KubeflowJobState.CREATED

    def fetch_logs(self, job_name: str, stream: bool = False, lines: int = 100, timeout: int = 60) -> Any:
        """Yield the ranks' output, without kubectl."""
        job = KubernetesJob.named(self, job_name)
        yield from job.until_the_end() if stream else job.new_lines()


def _register() -> None:
    """Add the class to NeMo-Run's tables, which list exact classes. Without them `--detach` would wait."""
    EXECUTOR_MAPPING[KubernetesExecutor] = EXECUTOR_MAPPING[KubeflowExecutor]
    for name in ("_DETACH_SUPPORTED_EXECUTORS", "_PARALLEL_SUPPORTED_EXECUTORS"):
        known = vars(run.Experiment)[name]
        if KubernetesExecutor not in known:
            setattr(run.Experiment, name, (*known, KubernetesExecutor))


def under_torchrun(command: list[str]) -> list[str]:
    """Return the torchrun command that runs `command` on every rank, in the layout of Trainer's PET_* variables."""
    if command[0] == "torchrun":  # NeMo-Run's launcher; its variables are for a shell, which a pod does not start
        return [re.sub(r"\$(\w+)", r"$(\1)", word) for word in command]
    if command[0] != "python":
        command = ["--no-python", *command]
    elif command[1:3] == ["-m", RUNNER] and command[-1].endswith(".yaml"):
        command = ["-m", "distill_nemo", command[-1]]
    else:
        command = command[1:]
    return ["torchrun", "--tee", "3", *command]


def _patch(version: str, template: dict[str, Any]) -> dict[str, Any]:
    """Return a patch of the pods in the form of this version of Trainer."""
    if PATCHES[version] == "runtimePatches":
        job = {"name": CONTAINER, "template": {"spec": {"template": template}}}
        return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
    target = {"targetJobs": [{"name": CONTAINER}]}
    return {**target, **(template.get("spec", {}) if version == "2.0" else template)}
