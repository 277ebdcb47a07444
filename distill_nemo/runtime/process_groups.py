"""Start and end the process groups of a run."""

import contextlib
import math
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distill_nemo.config import ParallelismConfig
from distill_nemo.fields import require
from distill_nemo.runtime.device import backend, setup_device
from distill_nemo.runtime.gloo import share_gloo_device


@contextlib.contextmanager
def process_groups(parallelism: ParallelismConfig) -> Iterator[None]:
    """Join the world that torchrun or SLURM describes (else one process), and divide it by `parallelism`.

    Raises:
        ValueError: if the world size does not fit the layout.
    """
    setup_device()
    from megatron.core import parallel_state

    if backend() == "gloo" and parallelism.virtual_pipeline_model_parallel_size:
        # With two stages the previous and the next one are the same peer, and gloo mixes up their messages.
        require(
            parallelism.pipeline_model_parallel_size > 2,
            "on CPU a virtual pipeline needs parallelism.pipeline_model_parallel_size of 3 or more, got "
            f"{parallelism.pipeline_model_parallel_size}",
        )
    with world(parallelism.timeout_minutes):
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallelism.tensor_model_parallel_size,
                pipeline_model_parallel_size=parallelism.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=parallelism.virtual_pipeline_model_parallel_size,
                context_parallel_size=parallelism.context_parallel_size,
                expert_model_parallel_size=parallelism.expert_model_parallel_size,
                distributed_timeout_minutes=math.ceil(parallelism.timeout_minutes),
            )
            yield
        finally:
            parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def world(timeout_minutes: float) -> Iterator[None]:
    """Join the world that torchrun or SLURM describes (else one process), unless this process is in it already.

    A process that leaves a world of several must not join it again: the store still has the addresses of before.
    """
    setup_device()
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    mine = not dist.is_initialized()
    timeout = timedelta(minutes=timeout_minutes)
    stay_on_loopback()
    if backend() == "gloo":
        share_gloo_device()
    if mine:
        alone = os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ
        dist.init_process_group(
            backend(),
            timeout=timeout,
            # No device_id, as in Megatron's own loop. With it, every rank takes part in creating every group, even
            # those it is not in (ncclCommSplit): some two thousand times on 256 ranks. Without it, members connect at
            # first use. A single process uses no port, so two of them on a machine do not collide.
            **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}),
        )
    try:
        yield
    finally:
        if mine:
            dist.destroy_process_group()


@contextlib.contextmanager
def process_group_of_one() -> Iterator[None]:
    """Make a world of this process alone, before it joins the run's. No port is opened.

    If the process is in a world already, that one is used, and every rank must call this.
    """
    if dist.is_initialized():
        with process_groups(ParallelismConfig()):
            yield
        return
    setup_device()
    stay_on_loopback()
    dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        with process_groups(ParallelismConfig()):
            yield
    finally:
        dist.destroy_process_group()


def raise_everywhere(refusal: str | None) -> None:
    """Raise a `ValueError` on every rank if rank 0 has a refusal, so that no rank waits for it."""
    of_rank_0 = [refusal]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(of_rank_0)
    if of_rank_0[0] is not None:
        raise ValueError(of_rank_0[0])


def stay_on_loopback() -> None:
    """Bind gloo and NCCL to loopback if all ranks are on this machine. The user's settings take precedence."""
    here = os.environ.get("MASTER_ADDR", "127.0.0.1") in ("127.0.0.1", "::1", "localhost")
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback and (here or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "1")):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, loopback[0])


def is_joined() -> bool:
    """Return True if this process is in a world already: the run's, or its caller's."""
    return dist.is_initialized()


def rank() -> int:
    """Return this process's rank; outside a process group as torchrun sets it, else 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def of_all_ranks[T](own: T) -> list[T]:
    """Return every rank's value, in the order of the ranks. Collective: every rank must call it."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def world_size() -> int:
    """Return the number of processes; outside a process group as torchrun sets it, else 1."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
