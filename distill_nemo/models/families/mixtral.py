"""Mixtral: Mistral whose MLPs are mixtures of experts.

`router_jitter_noise` is not read: no model is trained with noise here.
"""

from typing import Any

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.config_fields import Fields
from distill_nemo.models.families.experts import read_experts, write_experts
from distill_nemo.models.families.family import Family, softmax_experts
from distill_nemo.models.families.pieces import (
    EXPERT,
    LAYER,
    Table,
    expert_ffn,
    experts,
    gated,
    hidden,
    layer_table,
    replicated,
    row_parallel,
)
from distill_nemo.models.families.windows import OptionalWindow, with_windows

BLOCK = LAYER + "block_sparse_moe."
ONE = BLOCK + "experts.{e}."
EXPERTS: Table = {
    "mlp.router.weight": replicated(BLOCK + "gate.weight", experts, hidden),
    EXPERT + "linear_fc1.weight": gated(ONE + "w1.weight", ONE + "w3.weight", expert_ffn),
    EXPERT + "linear_fc2.weight": row_parallel(ONE + "w2.weight", hidden, expert_ffn),
}
NAMES = {"count": "num_local_experts", "width": "intermediate_size"}


def _read(config: Fields) -> dict[str, Any]:
    return read_experts(config, **NAMES) | {"norm_topk_prob": True}


def _write(model: Architecture) -> dict[str, Any]:
    return write_experts(model, **NAMES)


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return layer_table(model, layer) | EXPERTS


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    experts=softmax_experts,
    own_fields=OptionalWindow,
    layers=with_windows,
    read_own=_read,
    write_own=_write,
    layer_table=_layer_table,
)
