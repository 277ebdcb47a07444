"""Calls to the Kubernetes API. They need the package `kubernetes`; a dry run does not."""

import json
import os
from collections.abc import Callable
from typing import Any

from urllib3.exceptions import HTTPError

from distill_nemo.executors.watch.jobs import UnseenError

TIMEOUT = (10, 60)  # seconds to connect, and between two reads
TRAIN_JOBS = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainjobs"}


class Refused(ValueError):  # noqa: N818
    """Refusal by Kubernetes."""


def connected(context: str | None) -> tuple[Any, Any]:
    """Return clients for custom and for core objects, from the kubeconfig or a pod's service account.

    Raises:
        ValueError: if there is neither, or the package `kubernetes` is not installed.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise ValueError("the Kubernetes client is not installed: pip install -e '.[kubernetes]'") from None
    settings = client.Configuration()
    settings.retries = False  # type: ignore[assignment]  # each of urllib3's three would wait for the full timeout
    try:
        # The package reads KUBECONFIG at import only, and NeMo-Run has imported it by now.
        config.load_kube_config(os.environ.get("KUBECONFIG") or None, context, settings)
    except config.ConfigException as error:
        try:
            config.load_incluster_config(settings)
        except config.ConfigException:
            raise ValueError(
                f"no Kubernetes cluster: {error} Set KUBECONFIG or run.executor.context; --dryrun shows what would "
                "be submitted"
            ) from None
    api = client.ApiClient(settings)
    return client.CustomObjectsApi(api), client.CoreV1Api(api)


def created(executor: Any, manifest: dict[str, Any], exist_ok: bool = False) -> dict[str, Any]:
    """Create an object and return it as the cluster stores it. An unknown field is an error.

    Raises:
        Refused: if Kubernetes refuses or does not answer, with its message.
    """
    kind, where = manifest["kind"], {"namespace": executor.namespace, "body": manifest, "field_validation": "Strict"}
    where["_request_timeout"] = TIMEOUT
    core = executor._core_v1_api
    calls: dict[str, Callable[..., Any]] = {
        "TrainJob": lambda **given: executor._custom_objects_api.create_namespaced_custom_object(**TRAIN_JOBS, **given),
        "ConfigMap": core.create_namespaced_config_map,
        "PersistentVolumeClaim": core.create_namespaced_persistent_volume_claim,
    }
    try:
        made = calls[kind](**where)
        return made if isinstance(made, dict) else made.to_dict()
    except HTTPError as error:
        raise Refused(f"Kubernetes does not answer: {error}") from None
    except Exception as error:
        status = getattr(error, "status", None)
        if status == 409 and exist_ok:
            return manifest
        if status is None:
            raise
        raise Refused(f"Kubernetes refused the {kind}: {_message(error)}{_advice(error, kind, executor)}") from None


def _advice(error: Any, kind: str, executor: Any) -> str:
    if kind == "TrainJob" and "unknown field" in _message(error):
        return f"; is its Trainer {executor.trainer_version}, as run.executor.trainer_version says?"
    if kind == "TrainJob" and error.status == 404 and "namespaces" not in _message(error):
        return "; is Kubeflow Trainer installed on it?"
    return ""


def _message(error: Any) -> str:
    """Return the API's own message."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {(error.body or error.reason or '').strip()}"


def answer_to(call: Callable[..., Any], raw: bool = False, **given: Any) -> Any:
    """Return the answer to a call of the API, as bytes if `raw`; None for an object that does not exist.

    Raises:
        UnseenError: for any other error, and if there is no answer.
    """
    from kubernetes.client.rest import ApiException

    try:
        answer = call(**given, _preload_content=not raw, _request_timeout=TIMEOUT)
        return answer.data if raw else answer
    except ApiException as error:
        if error.status in (400, 404):  # 400: the log of a container that does not run yet
            return None
        raise UnseenError(f"Kubernetes does not show it: {_message(error)}") from None
    except HTTPError as error:
        raise UnseenError(f"Kubernetes does not answer: {error}") from None
