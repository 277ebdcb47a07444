"""Memory of this host that a process may still take."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import psutil

CGROUPS = Path("/sys/fs/cgroup")


class Files(NamedTuple):
    """Files of a cgroup, and the line of its `memory.stat` for cached files that are not in use."""

    limit: str
    used: str
    cached: str


FILES = {  # by controllers in /proc/self/cgroup, where version 1 mounts them; version 2 names none
    "": Files("memory.max", "memory.current", "inactive_file"),
    "memory": Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(own: Path = Path("/proc/self/cgroup"), cgroups: Path = CGROUPS) -> int:
    """Return the bytes that this process can take: those of the host, or of the smallest limit above it.

    Containers and SLURM jobs have limits far below their host's memory, and the kernel kills a process that exceeds
    them.

    Args:
        own: file that names this process's cgroup.
        cgroups: mount point of cgroups.
    """
    found = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in FILES:
                found += _left_above(group, cgroups / controllers, FILES[controllers])
    return min(found)


def _left_above(group: str, mount: Path, files: Files) -> list[int]:
    """Return what the limits of a cgroup and of those above it leave. A container may see the topmost alone."""
    own = mount / group.strip("/")
    return [left for each in (own, *own.parents) if each.is_relative_to(mount) for left in _left(each, files)]


def _left(group: Path, files: Files) -> list[int]:
    """Return what a cgroup's limit leaves, as a list of one; empty without a limit. Cached files make room."""
    try:
        limit, used = ((group / name).read_text() for name in (files.limit, files.used))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [max(0, int(limit) - int(used) + int(statistics[files.cached]))]
    except (OSError, ValueError, KeyError):  # the root has none of these files, and no limit is called "max"
        return []
