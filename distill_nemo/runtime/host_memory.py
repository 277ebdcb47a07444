"""Memory of this host that a process may still take."""

import contextlib
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def available_memory(own: Path = Path("/proc/self/cgroup"), cgroups: Path = CGROUPS) -> int:
    """Return the bytes that this process can take: those of the host, or of the smallest limit above it.

    Containers and SLURM jobs have limits far below their host's memory, and the kernel kills a process that exceeds
    them. They are read from cgroups of version 2.

    Args:
        own: file that names this process's cgroup.
        cgroups: mount point of cgroups.
    """
    found = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError):
        named = [line[3:].strip("/") for line in own.read_text().splitlines() if line.startswith("0::")]
        group = cgroups.joinpath(*named)
        for each in (group, *group.parents):
            if each.is_relative_to(cgroups):
                found += _left(each)
    return min(found)


def _left(group: Path) -> list[int]:
    """Return what a cgroup's limit leaves, as a list of one; empty without a limit. Cached files make room."""
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [max(0, int(limit) - int(used) + int(statistics["inactive_file"]))]
    except (OSError, ValueError, KeyError):  # the root has none of these files, and no limit is called "max"
        return []
