"""Qwen3-MoE: Qwen3 whose MLPs are mixtures of experts, in some layers or all."""

from dataclasses import dataclass
from typing import Any

from distill_nemo.models.architecture import Layer
from distill_nemo.models.families.experts import SparseStep, read_experts, with_sparse_step, write_experts
from distill_nemo.models.families.family import Family, softmax_experts
from distill_nemo.models.families.windows import SwitchedWindow, with_windows


@dataclass(frozen=True)
class _Fields(SwitchedWindow, SparseStep):
    """A window that can be switched off, and dense layers."""


def _layers(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return with_sparse_step(values, with_windows(values, layers))


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4},
    qk_norm=True,
    experts=softmax_experts,
    own_fields=_Fields,
    layers=_layers,
    read_own=read_experts,
    write_own=write_experts,
)
