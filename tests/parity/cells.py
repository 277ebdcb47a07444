"""The matrix of layouts, models, losses and ways to compute them. Each cell is one global batch, compared with fp64.

A cell's errors are defined in `tests.distillation.worst_errors`.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.conversations import PACKS, Packed
from tests.distillation import Case, Layout, gradients_of, megatron_steps, worst_errors
from tests.distillation_reference import reference, write_targets
from tests.spawn import Gloo
from tests.tiny_models import has_experts, refuses, write_hf

# Sums run in another order: in fp32 the last of 7 digits differ. Measured worst values are in docs/parity.md.
TOLERANCE = 1e-5
FACTOR_IN_FP32 = 3.0  # allowed errors where fp32 is less exact, as a multiple of those of plain torch

LAYOUTS: dict[str, tuple[int, Layout]] = {  # processes, sizes
    "one process": (1, Layout()),
    "DP=2": (2, Layout()),
    "DP=4": (4, Layout()),
    "TP=2": (2, Layout(tensor=2)),
    "TP=4": (4, Layout(tensor=4)),
    "TP=2, SP": (2, Layout(tensor=2, sequence_parallel=True)),
    "PP=2": (2, Layout(pipeline=2)),
    "PP=4": (4, Layout(pipeline=4)),
    "PP=4, VPP=2": (4, Layout(pipeline=4, virtual=2)),
    "CP=2": (2, Layout(context=2)),
    "TP=2, PP=2": (4, Layout(tensor=2, pipeline=2)),
    "TP=2, CP=2": (4, Layout(tensor=2, context=2)),
    "TP=2, PP=2, DP=2": (8, Layout(tensor=2, pipeline=2)),
    "EP=2, DP=2": (2, Layout(expert=2)),
}

WIDE = {"width": 64, "heads": 8, "groups": 4}
NARROW = {"width": 32, "heads": 8, "groups": 4}
MODELS: dict[str, dict[str, Any]] = {  # arguments of write_hf; the student's name begins its pair's
    "teacher": {"layers": 10, **WIDE},
    "llama": {"seed": 2, "layers": 8, **NARROW},
    "llama of the same width": {"seed": 3, "layers": 8, **WIDE},
    "llama, 9 layers": {"seed": 4, "layers": 9, **NARROW},
    "tied llama": {"family": "llama_tied", "seed": 5, "layers": 8, **NARROW},
    "llama3 rope": {"family": "llama3_rope", "seed": 9, "layers": 8, **NARROW},
    "qwen2 (biases)": {"family": "qwen2", "seed": 6, "layers": 8, **NARROW},
    "qwen3 (qk norm)": {"family": "qwen3", "seed": 7, "layers": 8, **NARROW},
    "mistral (windows)": {"family": "mistral", "seed": 12, "layers": 8, **NARROW},
    "ministral (windows by layer)": {"family": "ministral", "seed": 13, "layers": 10, **WIDE},
    "nemotron_h (Mamba)": {"family": "nemotron_h", "seed": 21, "layers": 8, **NARROW},
    "nemotron_h teacher": {"family": "nemotron_h", "seed": 23, "layers": 10, **WIDE},
    "nemotron_h experts": {"family": "nemotron_h_moe", "seed": 22, "layers": 8, **NARROW},
    "olmo2 (post norms)": {"family": "olmo2", "seed": 14, "layers": 8, **NARROW},
    "olmo3 (and windows, two ropes)": {"family": "olmo3", "seed": 15, "layers": 10, **WIDE},
    "two query groups": {"seed": 11, "layers": 8, **NARROW, "groups": 2},
    "phi3 (longrope)": {"family": "phi3", "seed": 13, "layers": 8, **WIDE, "heads": 4},
    "seed_oss (biases, wide heads)": {"family": "seed_oss", "seed": 16, "layers": 8, **NARROW},
    "smollm3 (NoPE)": {"family": "smollm3", "seed": 12, "layers": 8, **NARROW},
    "MoE teacher": {"family": "qwen3_moe", "seed": 10, "layers": 8, **WIDE},
    "MoE": {"family": "qwen3_moe", "seed": 8, "layers": 8, **NARROW},
    "glm4_moe (groups, shared experts)": {"family": "glm4_moe", "seed": 17, "layers": 8, **NARROW},
    "qwen2_moe (gated shared expert)": {"family": "qwen2_moe", "seed": 19, "layers": 8, **NARROW},
    "mixtral": {"family": "mixtral", "seed": 20, "layers": 8, **NARROW},
    "olmoe": {"family": "olmoe", "seed": 21, "layers": 8, **NARROW},
    "qwen3_moe, dense layers": {"family": "qwen3_moe_dense_layers", "seed": 18, "layers": 10, **WIDE},
    "gpt_oss (sinks, biased experts)": {"family": "gpt_oss", "seed": 20, "layers": 8, **NARROW},
    "gpt_oss teacher": {"family": "gpt_oss", "seed": 21, "layers": 10, **WIDE},
    "gemma2 teacher": {"family": "gemma2", "seed": 18, "layers": 10, **WIDE},
    "gemma2 (capped scores)": {"family": "gemma2", "seed": 19, "layers": 8, **NARROW},
    "deepseek_v3 (latent attention)": {"family": "deepseek_v3", "seed": 17, "layers": 8, **NARROW},
    "glm4_moe_lite": {"family": "glm4_moe_lite", "seed": 18, "layers": 10, **WIDE},
    "gemma3 teacher": {"family": "gemma3_text", "seed": 13, "layers": 10, **WIDE},
    "gemma3": {"family": "gemma3_text", "seed": 14, "layers": 8, **NARROW},
    "granite teacher": {"family": "granite", "seed": 11, "layers": 10, **WIDE},
    "granitemoe": {"family": "granitemoe", "seed": 24, "layers": 8, **NARROW},
    "granitemoehybrid (no Mamba)": {"family": "granitemoehybrid", "seed": 25, "layers": 10, **WIDE},
    "granite": {"family": "granite", "seed": 12, "layers": 8, **NARROW},
    "qwen3_next (and experts)": {"family": "qwen3_next", "seed": 19, "layers": 10, **WIDE},
    "qwen3_5_moe (delta nets, experts)": {"family": "qwen3_5_moe_text", "seed": 20, "layers": 8, **NARROW},
    "qwen3_5 teacher": {"family": "qwen3_5_text", "seed": 17, "layers": 10, **WIDE},
    "qwen3_5 (delta nets)": {"family": "qwen3_5_text", "seed": 18, "layers": 8, **NARROW},
    "llama + 30": {"seed": 2, "layers": 8, "offset": 30.0, **NARROW},  # offset of every logit
    "llama + 100": {"seed": 2, "layers": 8, "offset": 100.0, **NARROW},
    "teacher + 30": {"layers": 10, "offset": 30.0, **WIDE},
    "teacher + 100": {"layers": 10, "offset": 100.0, **WIDE},
}
FINAL = "decoder.final_layernorm:decoder.final_layernorm"
PARTS = ["decoder.layers.0.mlp:decoder.layers.0.mlp", "decoder.layers.5.self_attention:decoder.layers.7"]
LAYERS = ["decoder.layers.0:decoder.layers.0", "decoder.layers.5:decoder.layers.7"]  # on one stage in every layout
LOSSES: dict[str, dict[str, Any]] = {
    "forward KL": {},
    "forward KL, T=2, and LM": {"temperature": 2.0, "logits_weight": 0.7, "lm_weight": 0.3},
    "forward KL, T=2, no T²": {"temperature": 2.0, "scale_by_temperature_squared": False},
    "reverse KL, T=2": {"divergence": "reverse_kl", "temperature": 2.0},
    "Jensen-Shannon, beta=0.3": {"divergence": "jensen_shannon", "beta": 0.3},
    "top-8 and tail, T=2": {"top_k": 8, "temperature": 2.0},
    "cosine, projected, after the last norm": {"hidden_loss": "cosine", "hidden_layers": [FINAL], "hidden_weight": 2.0},
    "MSE, projected, on early and late layers": {
        "hidden_loss": "mse", "hidden_layers": [*LAYERS, FINAL], "hidden_weight": 0.5, "lm_weight": 0.2,
    },
    "MSE alone, inside layers": {
        "hidden_loss": "mse", "hidden_weight": 1.0, "logits_weight": 0.0,
        "hidden_layers": PARTS,
    },
    "dynamic, LM, KL and cosine": {
        "balancer": "dynamic", "skip_lm_loss": False, "kd_loss_scale": 0.8,
        "hidden_loss": "cosine", "hidden_layers": LAYERS,
    },
    "dynamic, KL and MSE": {"balancer": "dynamic", "hidden_loss": "mse", "hidden_layers": [LAYERS[1]]},
}  # fmt: skip
HIDDEN = "MSE, projected, on early and late layers"
STORED: dict[str, tuple[str, dict[str, Any]]] = {  # codec of stored targets, which take the teacher's place, and losses
    "sampled, T=2, and LM": ("sampled", {"temperature": 2.0, "logits_weight": 0.7, "lm_weight": 0.3}),
    "sampled, dynamic, T=0.25, no T², and LM": (
        "sampled",
        {
            "balancer": "dynamic",
            "skip_lm_loss": False,
            "kd_loss_scale": 0.8,
            "temperature": 0.25,
            "scale_by_temperature_squared": False,  # large enough not to be scaled to the limit
        },
    ),
    "stored top 8 and tail, T=2": ("top_k", {"top_k": 8, "temperature": 2.0}),
}
for _name in ("forward KL", "reverse KL, T=2", "Jensen-Shannon, beta=0.3", "top-8 and tail, T=2"):
    STORED[f"stored hidden states, {_name}"] = "hidden", LOSSES[_name]


@dataclass(frozen=True)
class Cell:
    """One row of the matrix."""

    layout: str
    models: tuple[str, str]  # student, teacher
    loss: str
    way: str = ""  # other differences, in words
    masked: str = "some"
    changes: tuple[tuple[str, Any], ...] = ()  # of the layout
    documents: tuple[int, ...] = ()  # see Case
    pack: str = ""  # see Packed

    @property
    def sizes(self) -> Layout:
        return replace(LAYOUTS[self.layout][1], **dict(self.changes))

    def case(self, models: dict[str, str]) -> Case:
        """Return the batch and the losses, of models by their paths."""
        student, teacher = (models[name] for name in self.models)
        if self.pack:
            return Packed(student, teacher, LOSSES[self.loss], pack=self.pack)
        codec, losses = STORED[self.loss] if self.loss in STORED else ("", LOSSES[self.loss])
        return Case(student, teacher, losses, self.masked, self.documents, codec)


DENSE = ("llama", "teacher")
PAIRS = [  # at every layout that neither model refuses; with experts at EP=2 too
    ("tied llama", "teacher"),
    ("llama3 rope", "teacher"),
    ("qwen2 (biases)", "teacher"),
    ("qwen3 (qk norm)", "teacher"),
    ("seed_oss (biases, wide heads)", "teacher"),
    ("smollm3 (NoPE)", "teacher"),
    ("phi3 (longrope)", "teacher"),
    ("mistral (windows)", "ministral (windows by layer)"),
    ("nemotron_h (Mamba)", "teacher"),
    ("nemotron_h experts", "nemotron_h teacher"),
    ("olmo2 (post norms)", "olmo3 (and windows, two ropes)"),
    ("gemma2 (capped scores)", "gemma2 teacher"),
    ("gpt_oss (sinks, biased experts)", "gpt_oss teacher"),
    ("gemma3", "gemma3 teacher"),
    ("granite", "granite teacher"),
    ("granitemoe", "granitemoehybrid (no Mamba)"),
    ("glm4_moe (groups, shared experts)", "qwen3_moe, dense layers"),
    ("deepseek_v3 (latent attention)", "glm4_moe_lite"),
    ("qwen2_moe (gated shared expert)", "qwen3_moe, dense layers"),
    ("mixtral", "qwen3_moe, dense layers"),
    ("olmoe", "qwen3_moe, dense layers"),
    ("qwen3_5 (delta nets)", "qwen3_next (and experts)"),
    ("qwen3_5_moe (delta nets, experts)", "qwen3_5 teacher"),
]
DELTA_NETS = (
    "qwen3_5 (delta nets)",
    "qwen3_5_moe (delta nets, experts)",
)  # students whose gradients differ more in fp32, whatever computes them
CHANGED_LOGITS = ("gemma3", "granite")  # scaled or capped: their pairs are computed with whole logits, too
OFFSET = [  # models and losses
    (("llama + 30", "teacher + 30"), "Jensen-Shannon, beta=0.3"),
    (("llama + 100", "teacher + 100"), "Jensen-Shannon, beta=0.3"),
    (("llama + 100", "teacher"), "Jensen-Shannon, beta=0.3"),
    (("llama", "teacher + 100"), "Jensen-Shannon, beta=0.3"),
    (("llama + 100", "teacher + 30"), "forward KL, T=2, and LM"),
    (("llama + 100", "teacher + 30"), "reverse KL, T=2"),
    (("llama + 100", "teacher + 30"), "top-8 and tail, T=2"),
]
DOCUMENTS = (3, 9, 4)
APART = [  # models with windows, softcaps and latents, whose attention stays inside documents
    ("mistral (windows)", "ministral (windows by layer)"),
    ("gemma2 (capped scores)", "gemma2 teacher"),
    ("deepseek_v3 (latent attention)", "glm4_moe_lite"),
]
PACKED = ["one process", "DP=2", "TP=2, SP", "PP=2", "CP=2"]  # layouts
RECOMPUTED = (("micro_batch", 2), ("recompute", "full"))
WAYS: dict[str, dict[str, Any]] = {
    "micro batch 2": {"changes": (("micro_batch", 2),)},
    "micro batch 4": {"changes": (("micro_batch", 4),)},
    "distributed optimizer": {"changes": (("distributed_optimizer", True),)},
    "full recomputation": {"changes": (("recompute", "full"),)},
    "selective recomputation": {"changes": (("recompute", "selective"),)},
    "an all-masked micro batch": {"masked": "first"},
    "whole logits": {"changes": (("fused_linear", False),)},
    "documents apart": {"documents": DOCUMENTS},
    "documents apart, micro batch 2, full recomputation": {
        "documents": DOCUMENTS, "changes": RECOMPUTED,
    },
}  # fmt: skip


def cells() -> list[Cell]:
    """Return all cells: every layout with every loss, with every pair of models, and in every way."""
    return [cell for layout in LAYOUTS for cell in _of_layout(layout)]


def _of_layout(layout: str) -> Iterator[Cell]:
    if layout == "EP=2, DP=2":
        pairs = [("MoE", "MoE teacher"), ("llama", "MoE teacher"), ("MoE", "teacher")]
        yield from (Cell(layout, pair, loss) for pair in pairs for loss in ("forward KL", HIDDEN))
        yield Cell(layout, pairs[0], "forward KL", "distributed optimizer", changes=(("distributed_optimizer", True),))
        yield Cell(layout, pairs[0], HIDDEN, "full recomputation", changes=(("recompute", "full"),))
        yield Cell(layout, pairs[0], HIDDEN, "documents apart", documents=DOCUMENTS)
        yield Cell(layout, ("MoE", "teacher"), "sampled, T=2, and LM")
        yield from _packed(layout, pairs[0])
        yield from (
            Cell(layout, pair, HIDDEN)
            for pair in PAIRS
            if _allows(layout, pair) and any(has_experts(family_of(model)) for model in pair)
        )
        return
    yield from (Cell(layout, DENSE, loss) for loss in (*LOSSES, *STORED))
    yield Cell(layout, DENSE, "sampled, T=2, and LM", "full recomputation", changes=(("recompute", "full"),))
    yield Cell(layout, DENSE, "sampled, T=2, and LM", "an all-masked micro batch", masked="first")
    yield Cell(layout, ("llama of the same width", "teacher"), HIDDEN)
    yield Cell(layout, ("llama, 9 layers", "teacher"), "cosine, projected, after the last norm")
    for models in PAIRS:
        if _allows(layout, models):
            yield _with_experts(layout, models, HIDDEN)
            if models[0] in CHANGED_LOGITS:
                yield Cell(layout, models, HIDDEN, "whole logits", changes=(("fused_linear", False),))
    for models in APART:
        if _allows(layout, models):
            cell = _with_experts(layout, models, HIDDEN)
            yield replace(cell, way=", ".join(filter(None, (cell.way, "documents apart"))), documents=DOCUMENTS)
    yield from (Cell(layout, models, loss) for models, loss in OFFSET)
    if LAYOUTS[layout][1].tensor == 4:  # two ranks share a query group
        yield Cell(layout, ("two query groups", "teacher"), HIDDEN)
    else:
        yield _with_experts(layout, ("llama", "MoE teacher"), "forward KL")
        yield _with_experts(layout, ("MoE", "MoE teacher"), "forward KL")
    if layout in PACKED:
        yield from _packed(layout, DENSE)
    for way, differs in WAYS.items():
        if _possible(layout, differs):
            yield Cell(layout, DENSE, HIDDEN, way, **differs)


def _packed(layout: str, models: tuple[str, str]) -> Iterator[Cell]:
    """Yield the same conversations in packs of each width, alone and two at a time."""
    for pack in PACKS:
        yield Cell(layout, models, HIDDEN, pack, pack=pack)
        way = f"{pack}, micro batch 2, full recomputation"
        yield Cell(layout, models, HIDDEN, way, changes=RECOMPUTED, pack=pack)


def family_of(model: str) -> str:
    """Return the family of a model of `MODELS`."""
    return MODELS[model].get("family", "llama")


def _allows(layout: str, models: tuple[str, str]) -> bool:
    return not any(refuses(family_of(model), layout) for model in models)


def _with_experts(layout: str, models: tuple[str, str], loss: str) -> Cell:
    """Return the cell. Students with experts need sequence parallelism under tensor parallelism, as Megatron does."""
    sizes = LAYOUTS[layout][1]
    if has_experts(family_of(models[0])) and sizes.tensor > 1 and not sizes.sequence_parallel:
        return Cell(layout, models, loss, "SP", changes=(("sequence_parallel", True),))
    return Cell(layout, models, loss)


def _possible(layout: str, differs: dict[str, Any]) -> bool:
    """Return True if 8 samples make enough micro batches: one per rank, and with a virtual pipeline one per stage."""
    processes, sizes = LAYOUTS[layout]
    data_parallel = processes // (sizes.tensor * sizes.pipeline * sizes.context)
    size = dict(differs.get("changes", ())).get("micro_batch", 1)
    return 8 % (data_parallel * size) == 0 and (not sizes.virtual or 8 // size % sizes.pipeline == 0)


@dataclass(frozen=True)
class Errors:
    """The worst relative errors of a cell, and the limit for that of a gradient."""

    metric: float
    gradient: float
    allowed: float = TOLERANCE

    @property
    def beyond(self) -> bool:
        """True if an error is larger than allowed, or not a number."""
        return not (self.metric < TOLERANCE and self.gradient < self.allowed)


def write_models(root: Path) -> dict[str, str]:
    """Write every model of the matrix. Return the paths by name."""
    return {name: write_hf(root / str(i), **how) for i, (name, how) in enumerate(MODELS.items())}


def measure(wanted: Iterable[Cell], models: dict[str, str], group: Gloo, one: Gloo) -> Iterator[tuple[Cell, Errors]]:
    """Compute cells of one layout in the processes of `group`, and their references."""
    wanted = list(wanted)
    cases = [cell.case(models) for cell in wanted]
    errors = errors_of(cases, [cell.sizes for cell in wanted], group, one)
    for cell, case, (metric, gradient) in zip(wanted, cases, errors, strict=True):
        far = (cell.models, cell.loss) in OFFSET or cell.models[0] in DELTA_NETS
        yield cell, Errors(metric, gradient, _allowed(case) if far else TOLERANCE)


def errors_of(cases: list[Case], layouts: list[Layout], group: Gloo, one: Gloo) -> list[tuple[float, float]]:
    """Return the worst errors of metrics and gradients of each case, at layouts of the same sizes."""
    with tempfile.TemporaryDirectory() as root:
        outputs = [f"{root}/{i}" for i in range(len(cases))]
        for i, case in enumerate(cases):
            if case.codec:
                case.targets = f"{root}/{i}.safetensors"
                write_targets(case)
        ranks = group.run(megatron_steps, list(zip(cases, layouts, outputs, strict=True)))
        found = one.run(gradients_of, outputs)[0]
        return [worst_errors([rank[i] for rank in ranks], found[i], _reference(case)) for i, case in enumerate(cases)]


def _allowed(case: Case) -> float:
    """Return the limit of a gradient's error, a multiple of that of plain torch in fp32.

    fp32 logits are rounded themselves: at 100 to 8e-6, whatever the loss. Delta nets divide small sums by their norm.
    """
    key = f"{case!r} in fp32"
    if key not in _REFERENCES:
        _, gradients = reference(case, torch.float32)
        means, _ = _reference(case)
        _REFERENCES[key] = FACTOR_IN_FP32 * worst_errors([means], gradients, _reference(case))[1]
    return max(TOLERANCE, _REFERENCES[key])


_REFERENCES: dict[str, Any] = {}


def _reference(case: Case) -> Any:
    """Return the reference, which is the same for every layout and every packing."""
    key = repr(replace(case.unpacked(), targets=""))
    if key not in _REFERENCES:
        _REFERENCES[key] = reference(case)
    return _REFERENCES[key]
