"""Checks of names, variables, labels and quantities, which Kubernetes would make only after half is submitted."""

import re
from typing import Any

_HOST = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOMAIN = rf"(?=.{{1,253}}\Z|.{{1,253}}/){_HOST}(\.{_HOST})*"
_WORD = r"(?=[^/]{1,63}\Z)[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?"

# For `fullmatch`.
NAME = re.compile(_DOMAIN)  # of a Secret, a claim, a runtime, ...
NAMESPACE = re.compile(rf"(?=.{{1,63}}\Z){_HOST}")
VARIABLE = re.compile(r"(?!\.\.|\.\Z)[-._a-zA-Z][-._a-zA-Z0-9]*")
SECRET_KEY = re.compile(r"(?=.{1,253}\Z)(?!\.\.|\.\Z)[-._a-zA-Z0-9]+")
LABEL = re.compile(rf"({_DOMAIN}/)?{_WORD}")
LABEL_VALUE = re.compile(f"({_WORD})?")
QUANTITY = re.compile(r"(?=[0-9.]*[1-9])[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?")  # more than 0
RESERVED = {f"PET_{name}" for name in ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}


def check_names(executor: Any) -> None:
    """Refuse names of objects and images and amounts of memory that Kubernetes does not accept.

    Raises:
        ValueError: naming the field.
    """
    if not re.fullmatch(r"\S+", executor.image):
        raise ValueError(
            f'run.executor.image must name a container image with distill-nemo in it, got "{executor.image}"'
        )
    if not NAMESPACE.fullmatch(executor.namespace):
        raise ValueError(
            'run.executor.namespace must be a Kubernetes name of at most 63 letters (a-z, 0-9, "-"), got '
            f'"{executor.namespace}"'
        )
    names = [(name, getattr(executor, name)) for name in ("pvc", "storage_class", "service_account")]
    names += [("image_pull_secrets", each) for each in executor.image_pull_secrets]
    names += [("runtime", executor.runtime_ref)]
    for name, value in names:
        if value is not None and not NAME.fullmatch(value):
            raise ValueError(f'run.executor.{name} must be a Kubernetes name (a-z, 0-9, "-", "."), got "{value}"')
    sizes = {"memory": executor.memory_requests, "shared_memory": executor.shared_memory, "pvc_size": executor.pvc_size}
    for name, value in sizes.items():
        if value is not None and not QUANTITY.fullmatch(value):
            raise ValueError(f'run.executor.{name} must be a quantity such as 64Gi, got "{value}"')


def check_variables(executor: Any) -> None:
    """Refuse environment variables with bad or reserved names, or set twice.

    Raises:
        ValueError: naming the field.
    """
    others = [str(each.get("name", "")) for each in executor.env_list]
    for name in [*executor.env_vars, *others]:
        place = "env" if name in executor.env_vars else "secrets"
        if not VARIABLE.fullmatch(name):
            raise ValueError(f'run.executor.{place}: "{name}" is not the name of an environment variable')
        if name in RESERVED:
            raise ValueError(f'run.executor.{place}: "{name}" is set by Trainer')
        if (name in executor.env_vars) + others.count(name) > 1:
            raise ValueError(f'run.executor.secrets: "{name}" is set twice, here or in run.executor.env')


def check_labels(executor: Any) -> None:
    """Refuse labels that Kubernetes does not accept.

    Raises:
        ValueError: naming the field.
    """
    for name in ("labels", "pod_labels", "node_selector"):
        for key, value in getattr(executor, name).items():
            if not LABEL.fullmatch(key):
                raise ValueError(f'run.executor.{name}: "{key}" is not the key of a label, such as DOMAIN/NAME')
            if not isinstance(value, str) or not LABEL_VALUE.fullmatch(value):
                raise ValueError(
                    f'run.executor.{name}: {key} must be at most 63 letters, digits, "-", "_" or ".", got "{value}"'
                )
