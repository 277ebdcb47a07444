"""One device for all gloo groups of a process.

Torch gives every group its own device, whose thread wakes up a hundred times a second. A layout has some twenty groups,
and destroyed ones often keep their device. An idle process with 60 groups behind it used 4 % of a core.
"""

import functools
import os
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, distributed_c10d


@functools.cache
def _device() -> Any:
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        return ProcessGroupGloo.create_device(interface=interface)
    return ProcessGroupGloo.create_default_device()


class _OnOneDevice(ProcessGroupGloo):
    """Gloo group on the shared device, else as torch makes it. Its timeout cannot be changed later."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, **options_of_newer_torch: Any) -> None:
        options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices, options._timeout = [_device()], timeout
        for name, value in options_of_newer_torch.items():  # 2.15: enable_reconfigure
            setattr(options, name, value)
        super().__init__(store, rank, size, options)


def share_gloo_device() -> None:
    """Make new groups share a device, unless GLOO_SOCKET_IFNAME names several interfaces."""
    if "," not in os.environ.get("GLOO_SOCKET_IFNAME", ""):
        distributed_c10d.ProcessGroupGloo = _OnOneDevice
