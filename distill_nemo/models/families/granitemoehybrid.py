"""Granite 4 without Mamba layers and experts (350M, 1B, Micro): Granite whose MLPs are stored as shared experts."""

from typing import Any

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.config_fields import Fields, shown
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.granite import GraniteFields, multipliers, settings
from distill_nemo.models.families.pieces import LAYER, Table, ffn, gated_in_one, hidden, layer_table, row_parallel

MLP: Table = {
    "mlp.linear_fc1.weight": gated_in_one(LAYER + "shared_mlp.input_linear.weight"),
    "mlp.linear_fc2.weight": row_parallel(LAYER + "shared_mlp.output_linear.weight", hidden, ffn),
}


def _spelled(config: Fields) -> dict[str, Any]:
    types = config.values.get("layer_types")
    if isinstance(types, list):
        types = ["full_attention" if kind == "attention" else kind for kind in types]
    return {"layer_types": types, "intermediate_size": config.integer("shared_intermediate_size", 1024)}


def _refused(config: Fields) -> dict[str, bool]:
    types, position = config.values.get("layer_types"), config.values.get("position_embedding_type")
    count = config.values.get("num_local_experts", 8)
    return {
        f"num_local_experts {shown(count)} beside the shared one": count != 0,
        "a model with Mamba layers (layer_types absent or null)": types is None,
        f"a model with Mamba layers (layer_types {shown(types)})": isinstance(types, list)
        and any(kind != "full_attention" for kind in types),
        f"position_embedding_type {shown(position)}": position != "rope",
    }


def _write(model: Architecture) -> dict[str, Any]:
    """Return its fields of `config.json`. transformers checks sizes of Mamba layers even where there are none."""
    return {
        "shared_intermediate_size": model.ffn_hidden_size,
        "num_local_experts": 0,
        "layer_types": ["attention"] * model.num_layers,
        "position_embedding_type": "rope",
        "mamba_n_heads": 1,
        "mamba_d_head": "auto",
    }


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return layer_table(model, layer) | MLP


GRANITEMOEHYBRID = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    defaults={"max_position_embeddings": 2048},
    own_fields=GraniteFields,
    spelled=_spelled,
    refused=_refused,
    multipliers=multipliers,
    settings=settings,
    write_own=_write,
    layer_table=_layer_table,
)
