"""Qwen3-MoE: Qwen3 whose MLPs are mixtures of experts, in every layer."""

from typing import Any

from distill_nemo.models.architecture import Architecture
from distill_nemo.models.config_fields import MAX_EXPERTS, Fields, shown
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.windows import SwitchedWindow, with_windows


def _read_experts(config: Fields) -> dict[str, Any]:
    """Read the experts' fields. transformers 5 counts experts as `num_local_experts`, 4 as `num_experts`."""
    for name, every in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (config.values.get(name) or every) != every:
            raise ValueError(
                f"{config.where}: {name} = {shown(config.values[name])} is not supported: every layer must have "
                f"experts ({name} = {every})"
            )
    count = "num_experts" if config.values.get("num_experts") is not None else "num_local_experts"
    if config.values.get(count) is None:
        raise config.wrong("num_experts", "a positive integer")
    return {
        "num_experts": config.integer(count, most=MAX_EXPERTS),
        "num_experts_per_tok": config.integer("num_experts_per_tok", most=MAX_EXPERTS),
        "moe_ffn_hidden_size": config.integer("moe_intermediate_size"),
        "norm_topk_prob": config.flag("norm_topk_prob"),
    }


def _write_experts(model: Architecture) -> dict[str, Any]:
    """Write the experts' fields; transformers 5 reads `num_experts` as `num_local_experts`."""
    experts = model.experts
    assert experts is not None
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "moe_intermediate_size": experts.moe_ffn_hidden_size,
        "norm_topk_prob": experts.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4},
    qk_norm=True,
    has_experts=True,
    own_fields=SwitchedWindow,
    layers=with_windows,
    read_own=_read_experts,
    write_own=_write_experts,
)
