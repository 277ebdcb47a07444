"""Memory that a process may take under the limits of cgroups."""

import psutil
import pytest

from distill_nemo.runtime.host_memory import available_memory


def write_group(path, limit, used=0, cached=0):
    path.mkdir(exist_ok=True, parents=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


@pytest.mark.parametrize(
    ("job", "step", "left"),
    [((1000, 300, 50), ("max", 200), 750), ((1000, 300), (400, 200, 10), 210), ((1000, 1100), ("max", 0), 0)],
    ids=["of the job", "of its step", "none"],
)
def test_the_smallest_limit_above_a_process_holds(tmp_path, job, step, left):
    (tmp_path / "own").write_text("1:name=systemd:/other\n0::/slurm/job_1/step_0\n")
    (tmp_path / "cgroups").mkdir()
    write_group(tmp_path / "cgroups/slurm/job_1", *job)
    write_group(tmp_path / "cgroups/slurm/job_1/step_0", *step)
    assert available_memory(tmp_path / "own", tmp_path / "cgroups") == left


@pytest.mark.parametrize("seen", ["kubepods/pod_1", "."], ids=["the whole tree", "its own group alone"])
def test_limits_of_cgroups_of_version_1_hold(tmp_path, seen):
    (tmp_path / "own").write_text("9:memory:/kubepods/pod_1\n1:name=systemd:/kubepods/pod_1\n0::/\n")
    group = tmp_path / "cgroups" / "memory" / seen
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("1000\n")
    (group / "memory.usage_in_bytes").write_text("400\n")
    (group / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 100\n")
    assert available_memory(tmp_path / "own", tmp_path / "cgroups") == 700


def test_a_container_sees_its_own_limit_at_the_root(tmp_path):
    (tmp_path / "own").write_text("0::/\n")
    write_group(tmp_path, 1000, 300)
    assert available_memory(tmp_path / "own", tmp_path) == 700


def test_without_limits_it_is_that_of_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 12345}))
    assert available_memory(tmp_path / "absent", tmp_path) == 12345
