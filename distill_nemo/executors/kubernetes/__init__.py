"""Kubernetes with Kubeflow Trainer: a TrainJob, the config shipped with it, and its pods' logs."""

from distill_nemo.executors.descriptor import ExecutorDescriptor
from distill_nemo.executors.kubernetes.arguments import kubernetes_config
from distill_nemo.executors.kubernetes.jobs import KubernetesJob
from distill_nemo.executors.kubernetes.manifests import check_cluster, manifests_text, on_the_same_volume
from distill_nemo.executors.kubernetes.trainjob import KubernetesExecutor

KUBERNETES = ExecutorDescriptor(
    KubernetesExecutor,
    kubernetes_config,
    hidden=("is_shared",),
    check=KubernetesExecutor.check,
    has_variable=lambda executor, name: any(each["name"] == name for each in executor.env_list),
    preflight=check_cluster,
    job=KubernetesJob.of,
    beside=on_the_same_volume,
    manifest=manifests_text,
)
