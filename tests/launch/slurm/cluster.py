"""A complete SLURM on this machine, for the time of the tests: two nodes on loopback, accounting, no systemd.

munged, mariadbd, slurmdbd, slurmctld and two slurmd are children of the tests. Their files are in one directory, and
they are ended by process id.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server")
NEEDED = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch")
CPUS = 8  # per node, whatever the machine has: ranks that wait need none
PATIENCE = 120.0  # seconds for a daemon to answer

SLURM_CONF = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={n1}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=2
KillWait=5
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
JobRequeue=1
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={root}/munge.socket
FirstJobId=1000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs={cpus} RealMemory=10000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs={cpus} RealMemory=10000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=YES State=UP
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
DbdAddr=127.0.0.1
DbdHost=localhost
DbdPort={dbd}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=root
StorageLoc=slurm
LogFile={root}/slurmdbd.log
PidFile={root}/slurmdbd.pid
"""


def install() -> None:
    """Install the missing Debian packages.

    Raises:
        RuntimeError: if they cannot be installed.
    """
    if all(map(shutil.which, NEEDED)):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(f"tests/launch needs root and apt, or these packages: {' '.join(PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        subprocess.run(["apt-get", *command], check=True, stdout=subprocess.DEVNULL, env=environment)


class Cluster:
    """Use as `with Cluster(directory) as cluster:`, then run commands with `cluster.environment`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"SLURM_CONF": f"{root}/slurm.conf"}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def run(self, *arguments: str) -> str:
        """Return the standard output of a SLURM command."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout

    def _start(self) -> None:
        names = ("ctld", "dbd", "sql", "n1", "n2")
        values = {
            "root": self.root,
            "host": socket.gethostname(),
            "cpus": CPUS,
            **dict(zip(names, ports(5), strict=True)),
        }
        for name, text in (("slurm.conf", SLURM_CONF), ("slurmdbd.conf", SLURMDBD_CONF)):
            (self.root / name).write_text(text.format(**values))
            (self.root / name).chmod(0o600)
        for name in ("state", "spool.n1", "spool.n2", "sql"):
            (self.root / name).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        files = [f"--{option}={self.root / name}" for option, name in munge.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *files)
        self._database(values["sql"])
        self._until(lambda: (self.root / "munge.socket").exists())
        self._daemon("slurmdbd", "-D")
        self._until(lambda: self.run("sacctmgr", "-n", "-i", "list", "cluster") is not None)
        self.run("sacctmgr", "-i", "add", "cluster", "loopback")
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"])

    def _database(self, port: int) -> None:
        data = f"--datadir={self.root}/sql"
        options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--user=root"]
        subprocess.run(["mariadb-install-db", "--no-defaults", data, *options], check=True, capture_output=True)
        small = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--skip-name-resolve"]
        where = [f"--port={port}", "--bind-address=127.0.0.1", f"--socket={self.root}/sql.socket", "--user=root"]
        self._daemon("mariadbd", "--no-defaults", data, *where, *small, f"--pid-file={self.root}/sql.pid")
        self._until(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None)

    def _daemon(self, *arguments: str) -> None:
        log = (self.root / f"{arguments[0]}.{arguments[-1]}.out").open("wb") if arguments[0] == "slurmd" else None
        with log or (self.root / f"{arguments[0]}.out").open("wb") as out:
            environment = {**os.environ, **self.environment}
            self._daemons.append(subprocess.Popen(arguments, stdout=out, stderr=out, env=environment))

    def _until(self, ready) -> None:
        """Wait until `ready()` is true. Until then it may raise or return false."""
        end = time.time() + PATIENCE
        while True:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                if ready():
                    return
            ended = [daemon for daemon in self._daemons if daemon.poll() is not None]
            assert not ended, f"{ended[0].args} ended; see its log in {self.root}"
            assert time.time() < end, f"not ready; see the logs in {self.root}"
            time.sleep(0.2)

    def _stop(self) -> None:
        """End the daemons in reverse order of their start, the database last."""
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def ports(count: int) -> list[int]:
    """Return free ports on loopback."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
