"""Kubernetes with Kubeflow Trainer, as a TrainJob sees it: admission, torch plugin, jobs, and pods that really run."""

import contextlib
import copy
import re
import threading
import time
import uuid
from datetime import UTC, datetime

from tests.launch.kubernetes.api import ApiError, serve
from tests.launch.kubernetes.pods import Pod
from tests.launch.kubernetes.schemas import Schemas
from tests.launch.slurm.cluster import ports

RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
NAMESPACES = ("default", "training")
# ClusterTrainingRuntimes: restart policy of the pods, and number of restarts that a job survives
RUNTIMES = {"torch-distributed": ("Never", 0), "again": ("OnFailure", 3)}
STEP = 0.1


class Cluster:
    """Use as `with Cluster("2.3", directory) as cluster:`, then run commands with `cluster.environment`."""

    def __init__(self, trainer, root):
        self.trainer, self.root, self.schemas = trainer, root, Schemas(trainer)
        self.objects, self.pods, self.lock = {}, {}, threading.RLock()
        self._threads, self._closing = [], False

    def __enter__(self):
        self._server = serve(self)
        host, port = self._server.server_address
        config = KUBECONFIG.format(server=f"http://{host}:{port}", name=f"trainer-{self.trainer}")
        (self.root / "kubeconfig").write_text(config)
        self.environment = {"KUBECONFIG": str(self.root / "kubeconfig")}
        return self

    def __exit__(self, *error):
        self._closing = True
        for thread in self._threads:
            thread.join(30)
        self._server.shutdown()
        self._server.server_close()

    def claim(self, namespace, name):
        """Return the directory of a volume."""
        place = self.root / "claims" / namespace / name
        place.mkdir(parents=True, exist_ok=True)
        return place

    # -- the API

    def get(self, kind, namespace, name):
        with self.lock:
            if (kind, namespace, name) not in self.objects:
                raise ApiError(404, "NotFound", f'{kind.lower()}s "{name}" not found')
            return copy.deepcopy(self.objects[kind, namespace, name])

    def list(self, kind, namespace, selector):
        with self.lock:
            found = [each for (a, b, _), each in self.objects.items() if (a, b) == (kind, namespace)]
            if selector:
                label, _, value = selector.partition("=")
                found = [each for each in found if each["metadata"].get("labels", {}).get(label) == value]
            shown = copy.deepcopy(found)
            for each in shown:
                if kind == "Pod":
                    each["status"] = self.pods[each["metadata"]["name"]].status()
            return shown

    def create(self, namespace, body):
        kind, name = body["kind"], body["metadata"]["name"]
        if namespace not in NAMESPACES:
            raise ApiError(404, "NotFound", f'namespaces "{namespace}" not found')
        if errors := self.schemas.errors(body):
            unknown = [error for error in errors if error.startswith("unknown field")]
            if unknown:
                raise ApiError(400, "BadRequest", f"strict decoding error: {', '.join(unknown)}")
            raise ApiError(422, "Invalid", f'{kind} "{name}" is invalid: {"; ".join(errors)}')
        with self.lock:
            if (kind, namespace, name) in self.objects:
                raise ApiError(409, "AlreadyExists", f'{kind.lower()}s "{name}" already exists')
            if kind == "TrainJob":
                self._admit(name, body["spec"])
            made = copy.deepcopy(body)
            made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now()}
            self.objects[kind, namespace, name] = made
            if kind == "TrainJob":
                made["status"] = {}
                self._threads.append(threading.Thread(target=self._run, args=(namespace, name), daemon=True))
                self._threads[-1].start()
            return copy.deepcopy(made)

    def _admit(self, name, spec):
        """Refuse a TrainJob that Trainer's webhook would refuse."""
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
            raise ApiError(422, "Invalid", f'metadata.name: "{name}" is no RFC 1035 label')
        if spec["runtimeRef"]["name"] not in RUNTIMES:
            raise ApiError(
                403, "Forbidden", f"runtime {spec['runtimeRef']['name']} must be created before the TrainJob"
            )
        for each in spec["trainer"].get("env", []):
            if each["name"] in RESERVED:
                raise ApiError(403, "Forbidden", f"spec.trainer.env: {each['name']} is reserved")
        for job, container in _targets(spec):
            if job != "node" or container not in (None, "node"):
                raise ApiError(403, "Forbidden", f"must not patch what the runtime does not have: {job} {container}")

    def delete(self, kind, namespace, name):
        with self.lock:
            gone = self.get(kind, namespace, name)
            del self.objects[kind, namespace, name]
            for key, each in list(self.objects.items()):
                owners = each["metadata"].get("ownerReferences", [])
                if key[0] != "Pod" and any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                    del self.objects[key]
            return gone

    def log(self, namespace, name, options):
        self.get("Pod", namespace, name)
        text = self.pods[name].log(options)
        if text is None:
            raise ApiError(400, "BadRequest", f'container "node" in pod "{name}" is waiting to start')
        lines = text.splitlines(keepends=True)
        return text if options.get("timestamps") == "true" else "".join(line.partition(" ")[2] for line in lines)

    # -- the controllers

    def _run(self, namespace, name):
        """Run a TrainJob from its pods to its end, and until it is deleted."""
        job = self.objects["TrainJob", namespace, name]
        _, survives = RUNTIMES[job["spec"]["runtimeRef"]["name"]]
        port, began, ended = ports(1)[0], time.time(), False
        pods = [self._pod(job, index, port) for index in range(job["spec"]["trainer"]["numNodes"])]
        while not self._closing and ("TrainJob", namespace, name) in self.objects:
            for pod in pods:
                with self.lock:
                    pod.step()
            if not ended:
                ended = self._ends(job, pods, survives, began)
            elif ended == "Failed":
                self._stopped(pods)
            time.sleep(STEP)
        while not self._stopped(pods):
            if self._closing:
                for pod in pods:
                    pod.kill()
            time.sleep(STEP)
        with self.lock:
            for pod in pods:
                self.objects.pop(("Pod", namespace, pod.name), None)

    def _ends(self, job, pods, survives, began):
        """Return the condition of a job that has ended."""
        limit = job["spec"].get("activeDeadlineSeconds", float("inf"))
        if all(pod.over and pod.codes[-1] == 0 for pod in pods):
            ended, reason = "Complete", "JobsCompleted"
        elif time.time() > began + limit:
            ended, reason = "Failed", "DeadlineExceeded"
        elif sum(sum(code != 0 for code in pod.codes) for pod in pods) > survives:
            ended, reason = "Failed", "JobsFailed"
        else:
            return False
        condition = {"type": ended, "status": "True", "reason": reason, "message": "", "lastTransitionTime": _now()}
        with self.lock:
            job["status"]["conditions"] = [condition]
        return ended

    def _stopped(self, pods):
        """Stop the pods that still run. Return True if none does."""
        for pod in pods:
            if not pod.over:
                pod.stop()
            pod.step()
        return all(pod.process is None for pod in pods)

    def _pod(self, job, index, port):
        """Return the pod that JobSet makes of the runtime's template, the plugin's environment and the job's patch."""
        name, namespace, spec = job["metadata"]["name"], job["metadata"]["namespace"], job["spec"]
        trainer, index = spec["trainer"], str(index)
        container = {"name": "node", "image": trainer["image"], "command": trainer["command"]}
        container["env"] = [*trainer.get("env", []), *_torch(name, trainer)]
        if "resourcesPerNode" in trainer:
            container["resources"] = trainer["resourcesPerNode"]
        pod = {"restartPolicy": RUNTIMES[spec["runtimeRef"]["name"]][0], "containers": [container]}
        for patch in _patches(spec):
            for field, value in patch.items():
                if field == "containers":
                    container["volumeMounts"] = value[0].get("volumeMounts", [])
                else:
                    pod[field] = value
        labels = {"jobset.sigs.k8s.io/jobset-name": name, "batch.kubernetes.io/job-completion-index": index}
        about = {"name": f"{name}-node-0-{index}-{uuid.uuid4().hex[:5]}", "namespace": namespace, "labels": labels}
        about["annotations"] = {"batch.kubernetes.io/job-completion-index": index}
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": pod}
        errors = self.schemas.errors(manifest)
        assert not errors, errors
        manifest["metadata"]["creationTimestamp"] = _now()
        with self.lock:
            self.pods[about["name"]] = Pod(manifest, self, port)
            self.objects["Pod", namespace, about["name"]] = manifest
        return self.pods[about["name"]]


def _torch(name, trainer):
    """Return the environment that Trainer's torch plugin injects."""
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return [
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_NODE_RANK", "valueFrom": index},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]


def _patches(spec):
    """Return pod specs, in whichever field this Trainer has them."""
    for patch in spec.get("podSpecOverrides", []):
        yield {field: value for field, value in patch.items() if field != "targetJobs"}
    for patch in spec.get("podTemplateOverrides", []):
        yield patch.get("spec", {})
    for patch in spec.get("runtimePatches", []):
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            yield job["template"]["spec"]["template"].get("spec", {})


def _targets(spec):
    """Return each patched job with its containers."""
    overrides = [*spec.get("podSpecOverrides", []), *spec.get("podTemplateOverrides", [])]
    jobs = [target["name"] for patch in overrides for target in patch["targetJobs"]]
    for patch in spec.get("runtimePatches", []):
        jobs += [job["name"] for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]]
    containers = [each["name"] for patch in _patches(spec) for each in patch.get("containers", [])]
    return [(job, container) for job in jobs for container in containers or [None]]


def _now():
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


@contextlib.contextmanager
def clusters(root):
    """Return a cluster for each version of Trainer, and a kubeconfig with a context for each."""
    with contextlib.ExitStack() as stack:
        found = {}
        for trainer in ("2.0", "2.1", "2.3"):
            (root / trainer).mkdir()
            found[trainer] = stack.enter_context(Cluster(trainer, root / trainer))
        yield found


KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: {name}
clusters: [{{name: {name}, cluster: {{server: "{server}"}}}}]
users: [{{name: tester, user: {{}}}}]
contexts: [{{name: {name}, context: {{cluster: {name}, user: tester}}}}]
"""
