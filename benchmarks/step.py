"""A distillation step beside its parts and ModelOpt's step: `python -m benchmarks.step` writes results/step_*.json.

Every way is a step of the same loop (zero gradients, Megatron's schedule, report, optimizer) on the same random tokens,
by forward KL alone. A machine with a GPU measures the shape for GPUs, others the one for CPU.
"""

import argparse
import functools
import gc
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.measure import interleaved, peak_bytes, write_result
from benchmarks.memory import LiveBytes
from distill_nemo.config import DataConfig, ParallelismConfig, RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from distill_nemo.models.distillation.objective import Objective, Targets
from distill_nemo.models.distillation.stored_targets import StoredTeacher
from distill_nemo.runtime.device import setup_device

OURS, WHOLE, MODELOPT = "distill-nemo", "distill-nemo, whole logits", "ModelOpt"
AS_SHIPPED = "ModelOpt, Megatron's attention"  # as its users have it without Transformer Engine
TEACHER, STUDENT = "teacher forward", "student step"


@dataclass(frozen=True)
class Shape:
    """Layers, width and heads of teacher and student, and the tokens of a step."""

    teacher: tuple[int, int, int]
    student: tuple[int, int, int]
    vocabulary: int
    length: int
    samples: int
    tied: bool = False  # embeddings and output weights

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.samples * self.length

    @property
    def flops(self) -> int:
        """Operations of products and causal attention in a step; the student's backward takes twice its forward."""

        def forward(layers: int, width: int, _: int) -> int:
            return layers * (24 * width**2 + 2 * width * self.length) + 2 * width * self.vocabulary

        return self.tokens * (forward(*self.teacher) + 3 * forward(*self.student))


CPU_SHAPE = Shape((8, 512, 8), (4, 256, 4), 32000, 512, 2)
GPU_SHAPE = Shape((13, 1024, 16), (12, 512, 8), 128256, 4096, 2, tied=True)  # 295M and 103M


def main() -> None:
    """Measure the shape for this machine and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="a run has one thread in each process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setup_device()
    from distill_nemo.runtime.process_groups import process_groups
    from distill_nemo.runtime.seed import seed_everything

    gpu = torch.cuda.is_available()
    repeats = max(arguments.repeats, 20 if gpu else 1)
    with process_groups(ParallelismConfig()), tempfile.TemporaryDirectory() as root:
        seed_everything(0)
        found = compare(GPU_SHAPE if gpu else CPU_SHAPE, repeats, root)
    write_result(f"step_{'gpu' if gpu else 'cpu'}", {"repeats": repeats, "rows": [found]})


def compare(shape: Shape, repeats: int, root: str) -> dict[str, Any]:
    """Return seconds of each way, and the peak of memory beyond that between steps."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    config = run_config(shape, root)
    runs: dict[str, Callable[[], Any]] = {
        OURS: stepper(config),
        WHOLE: stepper(config, fused=False),
        MODELOPT: stepper(config, modelopt=True),
        STUDENT: stepper(config, teacher=False),
    }
    if not torch.cuda.is_available():
        with mock.patch("distill_nemo.models.layers.specs.CausalAttention", DotProductAttention):
            runs[AS_SHIPPED] = stepper(config, modelopt=True)
    runs[TEACHER] = teacher_forward(config)
    memory: dict[str, dict[str, int]] = {name: tensors_at_peak(run, shape) for name, run in runs.items()}
    for name, run in runs.items():
        gc.collect()
        memory[name]["extra_bytes"] = peak_bytes(run)
    sizes = smaller_and_doubled(shape)
    steps = {f"scaling {name}": stepper(run_config(each, root)) for name, each in sizes.items()}
    for run in steps.values():
        run()
    found = interleaved(runs | steps, repeats, warm=True)
    scaling = {name: found.pop(f"scaling {name}") | {"flops": each.flops} for name, each in sizes.items()}
    ways = {name: found[name] | memory[name] for name in runs}
    return asdict(shape) | {
        "tokens": shape.tokens,
        "dtype": config.training.dtype,
        "ways": ways,
        "scaling": scaling,
    }


def smaller_and_doubled(shape: Shape) -> dict[str, Shape]:
    """Return `once`, a step of a quarter of the work, and it with each size doubled, by the size's name."""

    def of_layers(times: int) -> dict[str, Any]:
        models = {"teacher": shape.teacher, "student": shape.student}
        return {name: (times * (layers // 2), *rest) for name, (layers, *rest) in models.items()}

    once = replace(shape, vocabulary=shape.vocabulary // 2, length=shape.length // 2, **of_layers(1))
    return {
        "once": once,
        "layers": replace(once, **of_layers(2)),
        "tokens": replace(once, samples=2 * once.samples),
        "vocabulary": replace(once, vocabulary=2 * once.vocabulary),
    }


def tensors_at_peak(run: Callable[[], Any], shape: Shape) -> dict[str, int]:
    """Return the peak of tensors in a step beyond those kept between steps, and the part of tensors as large as logits.

    Both are in bytes. The rest of `peak_bytes` belongs to the allocator and the libraries.
    """
    with LiveBytes(large=shape.tokens * shape.vocabulary) as live:
        run()  # Adam's moments, and all else that stays
        live.peak = between = live.live
        run()
    return {"tensor_bytes": live.peak - between, "logits_bytes": live.large_at_peak}


def run_config(shape: Shape, root: str) -> RunConfig:
    """Return a run of one micro batch per step, without evaluation and files."""
    models = [
        dict(
            family="llama",
            num_layers=layers,
            hidden_size=width,
            ffn_hidden_size=3 * width,
            num_attention_heads=heads,
            num_query_groups=heads // 2,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=shape.tied,
            max_position_embeddings=shape.length,
        )
        for layers, width, heads in (shape.teacher, shape.student)
    ]
    config = RunConfig(root, StudentConfig(**models[1]), TeacherConfig(**models[0]))
    config.data = DataConfig(sequence_length=shape.length)
    config.training = TrainingConfig(steps=10**6, micro_batch_size=shape.samples, global_batch_size=shape.samples)
    config.training.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return config


class RandomTokens(Dataset):
    """Random tokens, all of them valid, and with `stored` random targets of codec "sampled"."""

    def __init__(self, length: int, vocabulary: int, stored: StoredTeacher | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.targets = {} if stored is None else sampled_targets(length, vocabulary, stored.num, generator)
        self.rows = torch.randint(vocabulary, (64, length + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = self.rows[number]
        length = len(row) - 1
        return {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
            **self.targets,
        }


def sampled_targets(length: int, vocabulary: int, num: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return targets of a sample: random draws, of which a quarter of the ids is drawn, some of them often."""
    distinct = max(1, num // 4)
    ids, counts = torch.full((length, num), -1, dtype=torch.int32), torch.zeros(length, num, dtype=torch.int32)
    ids[:, :distinct] = torch.rand(length, vocabulary, generator=generator).topk(distinct).indices.int()
    counts[:, :distinct], counts[:, 0] = 1, num - distinct + 1
    numbers = {name: torch.ones(length) for name in ("entropy", "label_logprob")}
    flags = {"has_targets": torch.ones(length, dtype=torch.uint8), "top1": ids[:, 0].clone()}
    return {f"target_{name}": x for name, x in ({"ids": ids, "counts": counts} | numbers | flags).items()}


def stepper(
    config: RunConfig,
    teacher: bool = True,
    fused: bool = True,
    modelopt: bool = False,
    stored: StoredTeacher | None = None,
) -> Callable[[], dict[str, float]]:
    """Return a function that takes a run's next step; with `stored`, from random targets of a store."""
    import copy

    from distill_nemo.training.entry import resolve_models
    from distill_nemo.training.loop import Loop
    from distill_nemo.training.setup import build_chunks, wrap

    config = copy.deepcopy(config)
    config.distillation.fused_linear = fused
    if not teacher:
        config.teacher = None
    config, models = resolve_models(config)
    dtype = getattr(torch, config.training.dtype)
    built = functools.partial(build_chunks, config, models, dtype, load_weights=True, stored=stored)
    chunks = [modelopt_model(config, dtype)] if modelopt else built()
    data = RandomTokens(config.data.sequence_length, config.student.vocab_size or 0, stored)
    loop = Loop(config, wrap(chunks, config, dtype, load_weights=True), (data, None), setup_device())
    return functools.partial(loop.step, loop.batches(data, 0))


def teacher_forward(config: RunConfig) -> Callable[[], Tensor]:
    """Return a function that computes the teacher's logits of a micro batch."""
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve

    assert config.teacher is not None
    dtype = getattr(torch, config.training.dtype)
    data = RandomTokens(config.data.sequence_length, config.student.vocab_size or 0)
    teacher: Any = model_provider(student=resolve(config.teacher), parallelism=config.parallelism, dtype=dtype)
    teacher = teacher.cuda().requires_grad_(False).eval()
    rows = [data[number] for number in range(config.training.micro_batch_size)]
    inputs = [torch.stack([row[name] for row in rows]).cuda() for name in ("tokens", "position_ids")]
    return torch.no_grad()(lambda: teacher(*inputs, None))


def modelopt_model(config: RunConfig, dtype: torch.dtype) -> Any:
    """Return the pair as ModelOpt's Megatron plugin joins it, with a logits loss only."""
    import modelopt.torch.distill as mtd
    from modelopt.torch.distill.plugins import megatron as plugin

    from distill_nemo.models.distillation.convert import attach
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve

    assert config.teacher is not None
    student: Any = model_provider(student=config.student, parallelism=config.parallelism, dtype=dtype)
    teacher: Any = model_provider(student=resolve(config.teacher), parallelism=config.parallelism, dtype=dtype)
    teacher.requires_grad_(False)
    settings = plugin.setup_distillation_config(plugin.DistillationConfig(), student.config, teacher.config)
    mode = {"teacher_model": teacher, "criterion": settings.criterion, "loss_balancer": settings.loss_balancer}
    model: Any = mtd.convert(student, mode=[("kd_loss", mode)])
    plugin.adjust_distillation_model_for_mcore(model, settings)
    attach(model, objective=ModelOptObjective(model))
    return model.cuda()


class ModelOptObjective(Objective):
    """Objective of Megatron-LM's pretraining script for ModelOpt (megatron/post_training/loss_func.py)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def loss(self, output: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of ModelOpt's balancer."""

        def masked(losses: Any) -> Tensor:
            losses = losses[0] if isinstance(losses, tuple) else losses  # with two flags about reductions
            return (losses.float() * targets.loss_mask_BS).sum()

        lm_sum = masked(output)
        loss = self.model.compute_kd_loss(student_loss=lm_sum, loss_reduction_fn=masked)["kd_loss"]
        return loss, {"lm_loss": lm_sum, "kd_loss": loss}

    def metrics(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Refuse: only training steps are measured."""
        raise NotImplementedError


if __name__ == "__main__":
    main()
