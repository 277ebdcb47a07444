"""A kubelet that really executes a pod's command on this machine, with the pod's environment, mounts and log."""

import base64
import os
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
IMAGES = ("registry.local/distill:1",)  # images that can be pulled
# Content of the image. A pod's own name would resolve to its master; here all are on loopback.
IN_IMAGE = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "LANG": "C.UTF-8",
}


class Pod:
    """A pod with one container; its owner calls `step`."""

    def __init__(self, manifest, cluster, port):
        self.manifest, self.cluster, self.port = manifest, cluster, port
        self.name, self.namespace = manifest["metadata"]["name"], manifest["metadata"]["namespace"]
        self.container = manifest["spec"]["containers"][0]
        self.job = manifest["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"]
        self.root = cluster.root / "pods" / self.name
        self.root.mkdir(parents=True)
        self.process, self.killed_at, self.environment = None, None, None
        self.codes: list[int] = []  # exit codes of attempts that have ended
        self.waits = ("ContainerCreating", "")
        self.pulls = 0

    @property
    def restarts(self):
        return len(self.codes) if self.process is not None else max(0, len(self.codes) - 1)

    @property
    def over(self):
        """Return True if no attempt follows."""
        if self.process is not None or not self.codes:
            return False
        return self.codes[-1] == 0 or self.killed_at is not None or self.manifest["spec"]["restartPolicy"] == "Never"

    def step(self):
        """Start the container if possible; notice its end."""
        if self.process is not None:
            if self.process.poll() is not None:
                self.writer.join()
                self.codes.append(self.process.returncode)
                self.process = None
        elif not self.over and self.killed_at is None:
            self.waits = self._hindered()
            if self.waits is None:
                self._start()

    def _hindered(self):
        """Return the reason and message for why it cannot start."""
        if "nvidia.com/gpu" in self.container.get("resources", {}).get("requests", {}):
            return "Unschedulable", "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
        for volume in self.manifest["spec"].get("volumes", []):
            for field, kind, key in (
                ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
                ("configMap", "ConfigMap", "name"),
            ):
                if field in volume and (kind, self.namespace, volume[field][key]) not in self.cluster.objects:
                    message = f'{kind.lower()} "{volume[field][key]}" not found'
                    return ("Unschedulable", message) if kind != "ConfigMap" else ("ContainerCreating", message)
        if self.container["image"] not in IMAGES:
            self.pulls += 1
            reason = "ErrImagePull" if self.pulls % 20 < 10 else "ImagePullBackOff"
            return reason, f'failed to pull image "{self.container["image"]}": not found'
        try:
            self.environment = self._environment()
        except KeyError as error:
            return "CreateContainerConfigError", f"secret {error} not found"
        return None

    def _environment(self):
        found = {**IN_IMAGE, "HOME": str(self.root)}
        for each in self.container["env"]:
            if "value" in each:
                found[each["name"]] = each["value"]
            elif "secretKeyRef" in each["valueFrom"]:
                ref = each["valueFrom"]["secretKeyRef"]
                secret = self.cluster.objects["Secret", self.namespace, ref["name"]]
                found[each["name"]] = base64.b64decode(secret["data"][ref["key"]]).decode()
            else:
                path = each["valueFrom"]["fieldRef"]["fieldPath"]
                key = re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)[1]
                found[each["name"]] = self.manifest["metadata"]["annotations"][key]
        return found | {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(self.port)}

    def _start(self):
        command = [self._expanded(word) for word in self.container["command"]]
        for path, place in self._mounts().items():
            command = [f"{place}{word[len(path) :]}" if f"{word}/".startswith(f"{path}/") else word for word in command]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=self.root, env=self.environment, start_new_session=True, **pipe)
        log = self.root / f"log.{len(self.codes)}"
        self.writer = threading.Thread(target=_stamp, args=(self.process.stdout, log), daemon=True)
        self.writer.start()

    def _expanded(self, word):
        return re.sub(r"\$\((\w+)\)", lambda match: self.environment.get(match[1], match[0]), word)

    def _mounts(self):
        """Return each volume's path in the container and on this machine. A claim is also visible at its own path."""
        volumes = {volume["name"]: volume for volume in self.manifest["spec"].get("volumes", [])}
        found = {}
        for mount in self.container.get("volumeMounts", []):
            volume, path = volumes[mount["name"]], Path(mount["mountPath"])
            place = self.root / "volumes" / mount["name"]
            if "persistentVolumeClaim" in volume:
                place = self.cluster.claim(self.namespace, volume["persistentVolumeClaim"]["claimName"])
                assert path.is_relative_to(self.cluster.root), f"{path} cannot be mounted here"
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.is_symlink():
                    path.symlink_to(place)
            elif "configMap" in volume:
                data = self.cluster.objects["ConfigMap", self.namespace, volume["configMap"]["name"]]["data"]
                for item in volume["configMap"]["items"]:
                    (place / item["path"]).parent.mkdir(parents=True, exist_ok=True)
                    (place / item["path"]).write_text(data[item["key"]])
            if str(path) != "/dev/shm":
                found[str(path)] = place
        return found

    def stop(self):
        """Send SIGTERM to the container's first process, and SIGKILL to all when the grace period is over."""
        grace = self.manifest["spec"].get("terminationGracePeriodSeconds", 30)
        now = time.time()
        if self.killed_at is None:
            self.killed_at = now
            if self.process is not None:
                self.process.terminate()
        elif self.process is not None and now > self.killed_at + grace:
            self.kill()

    def kill(self):
        """Send SIGKILL to all of its processes."""
        if self.process is not None and self.process.poll() is None:
            for process in [
                *psutil.Process(self.process.pid).children(recursive=True),
                psutil.Process(self.process.pid),
            ]:
                process.kill()

    def status(self):
        """Return the pod's status as the API shows it."""
        state, last = {}, {}
        if self.process is not None:
            phase, state = "Running", {"running": {}}
        elif self.codes:
            phase = ("Succeeded" if self.codes[-1] == 0 else "Failed") if self.over else "Running"
            state = {
                "terminated": {"exitCode": self.codes[-1] % 256, "reason": "Error" if self.codes[-1] else "Completed"}
            }
        else:
            reason, message = self.waits or ("ContainerCreating", "")
            phase = "Pending"
            if reason == "Unschedulable":
                condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
                return {"phase": phase, "conditions": [condition]}
            state = {"waiting": {"reason": reason, "message": message}}
        if self.restarts:
            last = {"terminated": {"exitCode": self.codes[self.restarts - 1] % 256, "reason": "Error"}}
        container = {"name": self.container["name"], "restartCount": self.restarts, "state": state, "lastState": last}
        return {"phase": phase, "containerStatuses": [container]}

    def log(self, options):
        """Return the log of the current container or of the previous one; None if there is none."""
        attempt = self.restarts - (options.get("previous") == "true")
        path = self.root / f"log.{attempt}"
        if attempt < 0 or not path.exists():
            return None
        since = datetime.now(UTC).timestamp() - float(options.get("sinceSeconds", "inf"))
        lines = path.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if line.endswith("\n") and _seconds(line) >= since)


def _stamp(pipe, path):
    """Write lines as a container runtime does, each with its time."""
    last = ""
    with path.open("a") as file:
        for line in pipe:
            now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}000Z"
            while now <= last:  # two within a microsecond
                now = f"{last[:-1][:-3]}{int(last[-4:-1]) + 1:03}Z"
            last = now
            file.write(f"{now} {line.decode(errors='replace').rstrip(chr(10))}\n")
            file.flush()


def _seconds(line):
    return datetime.fromisoformat(line[:26] + "+00:00").timestamp()
