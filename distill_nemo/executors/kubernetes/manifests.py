"""Checks that need the cluster and its volumes, and the YAML of the objects for a dry run."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from distill_nemo.executors.descriptor import on_one_node
from distill_nemo.executors.kubernetes.trainjob import KubernetesExecutor
from distill_nemo.executors.worker_config import paths_of
from distill_nemo.job_config import JobConfig


def check_cluster(config: JobConfig, executor: KubernetesExecutor, dryrun: bool) -> None:
    """Refuse a run whose output would be lost and, unless it is a dry run, a cluster that cannot be reached.

    Raises:
        ValueError: naming the field.
    """
    _check_mounted(config, executor)
    if not dryrun:
        executor._load_kube_clients()


def _check_mounted(config: JobConfig, executor: KubernetesExecutor) -> None:
    output, path = next(paths_of(config))
    where = " or ".join(executor.mounts) or "a volume: run.executor.pvc="
    mounts = tuple(f"{path}/" for path in executor.mounts)
    outside = {name: path for name, path in paths_of(config) if not f"{os.path.normpath(path)}/".startswith(mounts)}
    if output in outside:
        raise ValueError(
            f'{output} = "{path}" would be lost with the pods: it must be below {where}'
            + ("" if executor.mounts else f", mounted at {executor.mount}")
        )
    if outside:
        fields = ", ".join(f"{name} = {path}" for name, path in outside.items())
        print(f"warning: not below {where}, so they must be in the image: {fields}", file=sys.stderr)


def on_the_same_volume(
    executor: KubernetesExecutor, make: Callable[[int], KubernetesExecutor], devices: int | None
) -> KubernetesExecutor:
    """Return the executor of a pod beside those of another one, whose job makes the claim for both."""
    beside = on_one_node(executor, make, devices)
    beside.pvc_size = beside.storage_class = None
    executor.is_shared = True
    return beside


def manifests_text(job: Any, directory: Path) -> str:
    """Return the objects of a NeMo-Run job as YAML for `kubectl create -f`."""
    request = job._dryrun_info.request
    objects = job.executor.manifests(job.executor._trainjob_name(request.name), request.cmd)
    owned = "# Submitted after the TrainJob, which owns it: deleting the TrainJob deletes it too.\n"
    return "".join(f"---\n{owned if each['kind'] == 'ConfigMap' else ''}{_yaml(each)}" for each in objects).rstrip()


def _yaml(manifest: dict[str, Any]) -> str:
    """Return YAML that shows multi-line text, such as files, as blocks."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(manifest, Dumper=Dumper, sort_keys=False, width=10_000)
