"""Predicted and measured peaks of training on CPU: `python -m benchmarks.memory` writes docs/planning.md's table.

The measured value is the memory of tensors: every allocation through torch's dispatcher, in forward, backward and
optimizer, from the construction of the models on.
"""

import json
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_nemo.config import RunConfig, StudentConfig, TeacherConfig
from distill_nemo.models.families import FAMILIES
from tests.training import changed

RESULTS, PAGE = Path(__file__).parent / "results" / "memory.json", Path(__file__).parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
SETTINGS = dict[str, Any]


@dataclass
class Case:
    """A pair of random models and settings of their training; `fields` are `section.field` of `RunConfig`."""

    fields: SETTINGS = field(default_factory=dict)
    family: str = "llama"
    groups: int = 2  # heads that share a key
    vocab: int = 32000
    student: tuple[int, int] = (4, 256)  # layers, width
    teacher: tuple[int, int] | None = (8, 512)
    length: int = 512
    micro_batch: int = 2
    ranks: int = 1

    def config(self) -> RunConfig:
        """Return the run, which writes nothing."""
        run = RunConfig("nowhere", self._model(StudentConfig, *self.student))
        run.teacher = None if self.teacher is None else self._model(TeacherConfig, *self.teacher)
        run.data.sequence_length = self.length
        run.training.micro_batch_size, run.training.global_batch_size = self.micro_batch, 2 * self.micro_batch
        return changed(run, self.fields)

    def _model(self, cls: type, layers: int, width: int) -> Any:
        heads = max(width // 64, 4)
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_ffn_hidden_size": width}
        return cls(
            family=self.family,
            num_layers=layers,
            hidden_size=width,
            ffn_hidden_size=3 * width,
            num_attention_heads=heads,
            num_query_groups=heads // self.groups,
            vocab_size=self.vocab,
            **(moe if FAMILIES[self.family].experts and not FAMILIES[self.family].may_be_dense else {}),
        )


CASES = {
    "fused (default)": Case(),
    "micro batch 1": Case(micro_batch=1),
    "micro batch 4": Case(micro_batch=4),
    "whole logits": Case({"distillation.fused_linear": False}),
    "whole logits, LM loss too": Case({"distillation.fused_linear": False, "distillation.lm_weight": 0.5}),
    "recompute=full": Case({"training.recompute": "full"}),
    "recompute=full, micro batch 4, V = 2,048": Case({"training.recompute": "full"}, vocab=2048, micro_batch=4),
    "recompute=selective, V = 2,048": Case({"training.recompute": "selective"}, vocab=2048),
    "teacher offloaded": Case({"distillation.offload_teacher": True}),
    "without a teacher": Case(teacher=None),
    "all heads with keys of their own": Case(groups=1, vocab=2048),
    "Qwen3, qk-norm": Case(family="qwen3", vocab=2048),
    "experts": Case(family="qwen3_moe", vocab=2048),
    "sequence 1,024": Case(length=1024, vocab=2048, micro_batch=1),
    "2 ranks: data": Case(ranks=2),
    "2 ranks: tensor, sequence": Case(
        {"parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True}, ranks=2
    ),
    "2 ranks: pipeline": Case({"parallelism.pipeline_model_parallel_size": 2}, ranks=2),
    "2 ranks: context": Case({"parallelism.context_parallel_size": 2}, ranks=2),
}


class LiveBytes(TorchDispatchMode):
    """Bytes of live tensors, and their peak since `peak` was set.

    `large_at_peak` is the part of tensors with at least `large` elements.
    """

    def __init__(self, large: float = float("inf")) -> None:
        super().__init__()
        self.live = self.peak = self.large_at_peak = 0
        self._large, self._live_large = large, 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), leaf.numel() >= self._large)
        return out

    def _count(self, storage: Any, large: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or size == 0:
            return

        def freed(_: Any) -> None:
            del self._seen[key]
            self.live -= size
            self._live_large -= size * large

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
        self._live_large += size * large
        if self.live > self.peak:
            self.peak, self.large_at_peak = self.live, self._live_large


def measured(case: Case) -> int:
    """Return the peak of this rank in the second step, when every buffer and optimizer state exists."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    device = setup_device()
    from distill_nemo.data.stored_windows import empty_targets
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.entry import resolve_models
    from distill_nemo.training.loop import Loop
    from distill_nemo.training.setup import build_train_state
    from distill_nemo.training.stores import stored_teacher, target_fields

    run, models = resolve_models(case.config())
    with process_groups(run.parallelism), LiveBytes() as live:
        seed_everything(0)
        loop = Loop(run, build_train_state(run, models, torch.float32, True, stored_teacher(run)), (None, None), device)
        tokens = torch.randint(case.vocab, (run.training.micro_batch_size, case.length))
        positions = torch.arange(case.length).expand_as(tokens)
        batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(tokens.shape), "position_ids": positions}
        if (targets := target_fields(run)) is not None:
            empty = empty_targets(targets, case.length)
            batch |= {name: torch.stack([x] * len(tokens)) for name, x in empty.items()}
            batch["target_has_targets"].fill_(1)
        loop.step([iter(lambda: batch, None)])
        live.peak = live.live
        loop.step([iter(lambda: batch, None)])
        return live.peak


def predicted(case: Case) -> list[int]:
    """Return the predicted peak of each pipeline rank."""
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from distill_nemo.planning.memory import memory_of
    from distill_nemo.planning.planned import PlannedRun
    from distill_nemo.training.entry import resolve_models
    from distill_nemo.training.stores import check_stores

    config, models = resolve_models(case.config())
    stored = check_stores(config, models.student.vocab_size)
    planned = PlannedRun(config, models, case.ranks, on_gpu=False, transformer_engine=False, stored=stored)
    ranks = range(planned.config.parallelism.pipeline_model_parallel_size)
    return [round(memory_of(planned, rank).total) for rank in ranks]


def compared(case: Case, group: Any) -> tuple[int, int]:
    """Return the predicted and measured peak of the fullest rank; `group` is a `tests.spawn.Gloo` of as many ranks."""
    return max(predicted(case)), max(group.run(measured, case))


def main() -> None:
    """Measure every case."""
    from tests.spawn import Gloo

    results = {}
    with Gloo(1, init=False, timeout=900) as one, Gloo(2, init=False, timeout=900) as two:
        for name, case in CASES.items():
            results[name] = compared(case, one if case.ranks == 1 else two)
            print(name, *results[name], flush=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "bytes": results}, indent=1) + "\n")
    rows = [
        f"| {name} | {ours / 1e6:,.1f} | {theirs / 1e6:,.1f} | {ours / theirs - 1:+.1%} |\n"
        for name, (ours, theirs) in results.items()
    ]
    before, rest = PAGE.read_text().split(BEGIN)
    head = "| | predicted, MB | measured, MB | apart |\n|---|---|---|---|\n"
    PAGE.write_text(before + BEGIN + head + "".join(rows) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
