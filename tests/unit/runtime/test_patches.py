"""Every replacement in Megatron or torch is still needed: without it, a run on CPU fails or resumes wrongly."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

from tests.spawn import Gloo
from tests.training import metrics, tiny_run


def train(inputs, output, steps=2):
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output, steps=steps, eval_interval=1)
    run.checkpoint.save_interval, run.training.recompute = 1, "full"
    run.optimizer.decay_steps, run.optimizer.warmup_steps = 4, 1
    run_config(run)


def failures_without_each_replacement(inputs, output):
    """Return {replacement: error of a run without it}; None if the run succeeds."""
    import torch

    from distill_nemo.runtime import device

    before = {(id(owner), name): getattr(owner, name) for owner, name, _ in device.cpu_replacements()}
    device.setup_device()
    train(inputs, f"{output}/all")
    failures = {}
    for owner, name, _ in device.cpu_replacements():
        now = getattr(owner, name)
        setattr(owner, name, before[id(owner), name])
        where = f"{owner.__name__}.{name}"
        failures[where] = _failure(lambda where=where: train(inputs, f"{output}/without_{where}"))
        setattr(owner, name, now)
    with torch._C.DisableTorchFunction():
        failures["_CudaMeansCpu"] = _failure(lambda: train(inputs, f"{output}/without_mode"))
    return failures


def _failure(run):
    import torch

    waiting = len(torch.cuda._queued_calls)
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "calls pile up for a GPU that never comes" if len(torch.cuda._queued_calls) > waiting else None


def test_every_replacement_on_cpu_is_still_needed(inputs, tmp_path):
    with Gloo(1, init=False, timeout=300, fresh=True) as untouched:
        failures = untouched.run(failures_without_each_replacement, inputs, tmp_path)[0]
    not_missed = [where for where, failure in failures.items() if failure is None]
    assert not_missed == ([] if Version(version("megatron-core")) >= Version("0.19") else ["torch.cuda.current_stream"])


def test_resuming_needs_help_with_torchs_adam(inputs, one, tmp_path):
    """Megatron looks for Adam's step among its tensors. test_resume.py tests the replacement."""
    one.run(train, inputs, tmp_path, 2)
    with pytest.raises(KeyError, match="step"):
        one.run(resume_without_help, inputs, tmp_path)
    one.run(train, inputs, tmp_path, 4)
    assert metrics(tmp_path)[-1]["step"] == 4


def resume_without_help(inputs, output):
    from distill_nemo.checkpoint import load

    helped = load.load_optimizer_state
    load.load_optimizer_state = lambda optimizer, saved, step: optimizer.load_state_dict(saved)
    try:
        train(inputs, output, 4)
    finally:
        load.load_optimizer_state = helped


THREADS = """
import os
import torch.distributed as dist
from distill_nemo.runtime.gloo import share_gloo_device

def started(count=4):
    before = len(os.listdir("/proc/self/task"))
    groups.extend(dist.new_group([0], backend="gloo") for _ in range(count))
    return len(os.listdir("/proc/self/task")) - before

groups = []
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
alone = started()
share_gloo_device()
started(1)  # with the device
print(alone - started(), flush=True)
os._exit(0)
"""


def test_torch_still_gives_every_gloo_group_a_device_and_its_thread():
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", THREADS], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "4"  # torch 2.10 also prints what gloo connects


def managers_started():
    """Return the number of processes that Megatron starts to hold the results of an asynchronous save."""
    from multiprocessing.context import BaseContext
    from unittest import mock

    from distill_nemo.runtime.device import setup_device

    setup_device()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with (
        mock.patch.object(BaseContext, "Manager") as manager,
        mock.patch.object(filesystem_async, "_results_queue", None),
    ):
        filesystem_async.get_write_results_queue()
        return manager.call_count


def test_megatron_still_starts_a_process_for_the_results_of_a_save(one):
    assert one.run(managers_started) == [1]


def test_nemo_run_still_knows_an_executor_by_its_exact_class():
    from nemo_run.core.execution.kubeflow import KubeflowExecutor
    from nemo_run.run.torchx_backend.schedulers.api import get_executor_str

    class Derived(KubeflowExecutor):
        pass

    with pytest.raises(KeyError, match="Derived"):
        get_executor_str(object.__new__(Derived))


IMPORT_ALL = """
import catalogue, importlib, os, pkgutil, sys, nemo_run, torch
from importlib.metadata import version
from nemo_run.core.execution import launcher
from nemo_run.core.tunnel import client
from nemo_run.run.torchx_backend.schedulers import api
from torch.distributed import distributed_c10d
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

LEFT_OUT = "__main__" if version("megatron-core") >= "0.19" else ("__main__", "gated_delta_net")

def owners():
    return (torch.cuda, torch.Tensor, torch.nn.Module, distributed_c10d, nemo_run, nemo_run.Experiment, api, launcher,
            client, nemo_run.SlurmExecutor, nemo_run.LocalExecutor, nemo_run.cli.RunContext)

def attributes():
    return {(owner.__name__, name): getattr(owner, name) for owner in owners() for name in dir(owner)}

def tables():
    found = (api.EXECUTOR_MAPPING, api.REVERSE_EXECUTOR_MAPPING, launcher.LAUNCHER_MAP)
    return [dict(table) for table in (*found, rendezvous_handler_registry._registry)]

def import_all_of(name):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith(LEFT_OUT):
            importlib.import_module(module.name)

before, tables_before, registered = attributes(), tables(), dict(catalogue.REGISTRY)
import_all_of("distill_nemo")
assert catalogue.REGISTRY == registered, catalogue.REGISTRY.keys() - registered.keys()
import_all_of("recipes")  # what NeMo-Run's entry point names: it registers commands and recipes, by calls

def check():
    added = {key[:-1] for key in catalogue.REGISTRY.keys() - registered.keys()}
    recipes = {("distill_nemo.training.entry.distill",), ("distill_nemo.cli.compress.compress",)}
    assert added == recipes | {("nemo_run.cli.entrypoints", "distill")}, added
    after = attributes()  # imports may add some; none of those that were there may change
    changed = [key for key in before if before[key] is not after[key] and before[key] != after[key]]
    assert len(before) > 1000 and not changed, changed
    assert tables() == tables_before, tables()

def sees(patch):  # in a fork, so that nothing stays patched
    if os.fork() == 0:
        exec(patch)
        try:
            check()
        except AssertionError:
            os._exit(0)
        os._exit(1)
    return os.wait()[1] == 0

check()
print([patch for patch in sys.argv[1:] if not sees(patch)], flush=True)
torch.cuda.is_available = lambda: True  # as on a machine with a GPU; nothing else is touched
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
from distill_nemo.runtime import device
os.environ["LOCAL_RANK"] = "1"
try:
    device.setup_device()
except RuntimeError as error:
    assert str(error).startswith("LOCAL_RANK=1 has no GPU, since this process sees 1: "), error
del os.environ["LOCAL_RANK"]
before = [getattr(owner, name) for owner, name, _ in device.cpu_replacements()]
assert str(device.setup_device()) == "cuda:0"
assert [getattr(owner, name) for owner, name, _ in device.cpu_replacements()] == before
assert not torch.are_deterministic_algorithms_enabled()
"""
PATCHES = (
    "api.EXECUTOR_MAPPING[int] = 'x'",
    "nemo_run.cli.factory(lambda: None, target=nemo_run.Executor, name='x')",
    "nemo_run.Experiment._DETACH_SUPPORTED_EXECUTORS += (int,)",
    "torch.cuda.synchronize = print",
    "pass",
)


def test_importing_the_package_patches_nothing_nor_does_a_run_where_cuda_is():
    """A patch would be seen, and no other code is taken for one."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, *PATCHES]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "['pass']"
