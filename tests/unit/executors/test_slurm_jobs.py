"""Jobs on SLURM through a tunnel: output of several attempts, accounting, an unresponsive login node."""

import os
import re

import nemo_run as run
import pytest
from invoke.exceptions import ThreadException
from nemo_run.core.tunnel.client import LocalTunnel
from paramiko import SSHException

from distill_nemo.executors.slurm.jobs import SlurmJob, State
from distill_nemo.executors.watch.jobs import UnseenError

SAYS_AND_IS_KILLED = """\
[default0]:step 5/60
[default0]:error on rank 0: Connection closed by peer
[default1]:step 5/60
"""
IS_TOLD_TO_STOP = """\
[default0]:resumed from step_00000004 at step 4 of 60
[default0]:stopped by signal 15; checkpoint written; the same command resumes
"""
GOES_ON = """\
[default0]:resumed from step_00000007 at step 7 of 60
[default0]:step 8/60
"""


def test_a_job_that_was_queued_again_is_seen_again_whatever_its_ranks_said_before(tmp_path):
    """Torchrun ends the ranks beside a killed one before or after they report a lost connection."""
    tunnel = LocalTunnel(job_dir=str(tmp_path))
    job = SlurmJob("train", "7", tunnel, f"{tmp_path}/train")
    (tmp_path / "train").mkdir()
    shown = []
    for attempt, text in enumerate((SAYS_AND_IS_KILLED, IS_TOLD_TO_STOP, GOES_ON)):
        (tmp_path / f"train/log-account.train_7_{attempt}.out").write_text(text)
        shown += job.new_shown()
    assert [line for line in shown if line] == [
        "step 5/60\n",
        "rank 1: step 5/60\n",
        "train: job 7 was started again: error on rank 0: Connection closed by peer\n",
        "resumed from step_00000004 at step 4 of 60\n",
        "stopped by signal 15; checkpoint written; the same command resumes\n",
        "train: job 7 was started again: it was told to stop, by the time limit or for another job\n",
        "resumed from step_00000007 at step 7 of 60\n",
        "step 8/60\n",
    ]
    assert list(job.new_shown()) == []


SACCT = """\
#!/bin/sh
case "$*" in *Restarts*) echo 'sacct: error: Invalid field requested: "Restarts"' >&2; exit 1;; esac
echo 'COMPLETED|0:0|00:01:12|01:00:00|n[1-2]|None'
"""


def test_a_job_that_slurm_has_forgotten_is_asked_of_accounting_in_words_of_slurm_22(tmp_path, monkeypatch):
    for name, text in {"sacct": SACCT, "scontrol": "#!/bin/sh\nexit 1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    state = SlurmJob("train", "7", LocalTunnel(job_dir=""), str(tmp_path)).state()
    assert state.completed and str(state) == "COMPLETED on n[1-2], 00:01:12 of 01:00:00"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "refused"),
        EOFError(),
        SSHException("not active"),
        ThreadException([]),
        SystemExit(1),
    ],
)
def test_a_login_node_that_does_not_answer_is_unseen(monkeypatch, error):
    """NeMo-Run turns a failed SSH handshake into SystemExit(1)."""
    tunnel = run.SSHTunnel(host="login", user="me", job_dir="/jobs")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(tunnel, "run", fails)
    job = SlurmJob("train", "7", tunnel, "/jobs/train")
    for ask in (job.state, lambda: list(job.new_shown()), lambda: list(job.new_text()), job.cancel):
        with pytest.raises(UnseenError, match="login"):
            ask()
    failed = State("FAILED", "", "00:01:12", "01:00:00", "n1", "1:0")
    assert re.fullmatch("error: the logs with the reason cannot be read: .*login.*", job.why(failed))
    error = SystemExit(130)
    with pytest.raises(SystemExit):
        job.state()
