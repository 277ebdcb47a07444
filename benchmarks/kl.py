"""KL of given logits, forward and backward: `python -m benchmarks.kl` writes results/kl_*.json.

A machine with a GPU measures the shape for GPUs, others those for CPU: one process, and two over gloo.
"""

import argparse
import functools
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.measure import interleaved, peak_bytes, write_result
from distill_nemo.config import ParallelismConfig
from distill_nemo.losses.divergences.forward_kl import ForwardKL
from distill_nemo.losses.kernels.dispatch import choose_kernels
from distill_nemo.runtime.device import setup_device

GPU_SHAPE = (8192, 128256)
SHAPES = [(1024, 32000), (2048, 32000), (1024, 64000), (1024, 151936)]  # N and V: the goals' and one doubling of each


def main() -> None:
    """Measure the shapes for this machine and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of one process; two ranks have one each")
    parser.add_argument("--only", choices=["cpu", "two_ranks", "gpu"])
    arguments = parser.parse_args()
    kinds = ["gpu"] if torch.cuda.is_available() else ["cpu", "two_ranks"]
    for kind in [arguments.only] if arguments.only else kinds:
        torch.set_num_threads(1 if kind == "two_ranks" else arguments.threads)
        repeats = max(arguments.repeats, 20) if kind == "gpu" else arguments.repeats
        rows = {"cpu": on_cpu, "two_ranks": on_two_ranks, "gpu": on_gpu}[kind](repeats)
        write_result(f"kl_{kind}", {"repeats": repeats, "rows": rows})


def on_cpu(repeats: int) -> list[dict[str, Any]]:
    """Measure every shape in this process, the slow ways at the goals' shapes only."""
    setup_device()
    goals = {SHAPES[0], SHAPES[-1]}
    return [compare(*shape, repeats, ways() if shape in goals else {"distill-nemo": ours}) for shape in SHAPES]


def on_gpu(repeats: int) -> list[dict[str, Any]]:
    """Measure on a GPU, also Liger's losses and a copy of the bytes of one tensor of logits."""
    setup_device()
    others = ways() | liger()
    row = compare(*GPU_SHAPE, repeats, others)
    logits = torch.empty(*GPU_SHAPE, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(logits)
    seconds = interleaved({"copy": lambda: target.copy_(logits)}, repeats)["copy"]["seconds"]
    row["copy_bytes_per_second"] = 2 * logits.numel() * 2 / seconds
    return [row]


def compare(num_tokens: int, width: int, repeats: int, losses: dict[str, Callable[..., Tensor]]) -> dict[str, Any]:
    """Return seconds of each way, and peak memory beyond inputs and gradient, in fp32 tensors of the logits."""
    student, teacher = logits(num_tokens, width)
    gradient_bytes, fp32_bytes = student.numel() * 2, student.numel() * 4

    def step(loss: Callable[..., Tensor]) -> None:
        student.grad = None
        loss(student, teacher).sum().backward()

    runs = {name: functools.partial(step, loss) for name, loss in losses.items()}
    found = interleaved(runs, repeats)
    for name, run in runs.items():
        student.grad = None
        gc.collect()
        found[name]["extra_memory"] = (peak_bytes(run) - gradient_bytes) / fp32_bytes
    kernels = choose_kernels(student, teacher)
    return {"tokens": num_tokens, "vocabulary": width, "dtype": "bfloat16", "kernels": kernels, "ways": found}


def logits(num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Return logits of student and teacher, [N, 1, V] in bf16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pair = [torch.randn(num_tokens, 1, width, device=device).bfloat16().mul_(4) for _ in range(2)]
    return pair[0].requires_grad_(), pair[1]


def ways() -> dict[str, Callable[..., Tensor]]:
    """Return the ways to compute KL, ours first."""
    compiled: Any = torch.compile(plain)
    return {"distill-nemo": ours, "ModelOpt": modelopt(), "torch": plain, "torch.compile": compiled}


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the loss as the training loop does."""
    return ForwardKL()(student, teacher)


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL by its formula."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def modelopt(tensor_parallel: int = 1) -> Callable[..., Tensor]:
    """Return LogitsKLLoss of ModelOpt's Megatron plugin."""
    from megatron.core.transformer import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=tensor_parallel
    )
    loss = LogitsKLLoss(config)
    return lambda student, teacher: loss(student, teacher)[0]


def liger() -> dict[str, Callable[..., Tensor]]:
    """Return Liger's losses of given logits, if it is installed (`pip install liger-kernel`)."""
    try:
        from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
    except ImportError:
        return {}
    kl, jsd = LigerKLDIVLoss(reduction="none", log_target=True), LigerJSD(beta=0.0)

    def pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        log_q, log_p = (x.flatten(0, 1).float().log_softmax(-1) for x in (student, teacher))
        return log_q, log_p

    return {"Liger KL": lambda s, t: kl(*pair(s, t)).sum(-1), "Liger JSD": lambda s, t: jsd(*pair(s, t))}


def on_two_ranks(repeats: int) -> list[dict[str, Any]]:
    """Measure ModelOpt's and ours with the vocabulary on two gloo processes; take the slower rank."""
    from tests.spawn import Gloo

    rows = []
    with Gloo(2, init=False, timeout=900) as group:
        for num_tokens, width in (SHAPES[0], SHAPES[-1]):
            ranks = group.run(_rank, num_tokens, width, repeats)
            slower = {
                name: {key: max(rank[name][key] for rank in ranks) for key in ranks[0][name]} for name in ranks[0]
            }
            rows.append({"tokens": num_tokens, "vocabulary": width, "dtype": "bfloat16", "ways": slower})
    return rows


def _rank(num_tokens: int, width: int, repeats: int) -> dict[str, Any]:
    setup_device()
    from megatron.core import parallel_state

    from distill_nemo.runtime.process_groups import process_groups

    with process_groups(ParallelismConfig(tensor_model_parallel_size=2)):
        group = parallel_state.get_tensor_model_parallel_group()
        losses = {
            "distill-nemo": lambda student, teacher: ForwardKL()(student, teacher, group),
            "ModelOpt": modelopt(2),
        }
        return compare(num_tokens, width // 2, repeats, losses)["ways"]


if __name__ == "__main__":
    main()
