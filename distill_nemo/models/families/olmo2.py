"""OLMo 2: Llama with norms after attention and MLP in place of before, and queries and keys normalised as a whole."""

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.pieces import (
    ATTENTION,
    LAYER,
    MLP,
    WIDE_QK_NORM,
    Table,
    hidden,
    replicated,
)

NORMED_ATTENTION: Table = {
    **{name: rule for name, rule in ATTENTION.items() if name != "input_layernorm.weight"},
    **WIDE_QK_NORM,
    "self_attn_bda.norm.weight": replicated(LAYER + "post_attention_layernorm.weight", hidden),
}
NORMED_MLP: Table = {**MLP, "mlp_bda.norm.weight": replicated(LAYER + "post_feedforward_layernorm.weight", hidden)}


def _layer_table(model: Architecture, layer: Layer) -> Table:
    table: Table = {} if layer.num_query_groups is None else dict(NORMED_ATTENTION)
    return table if layer.ffn_hidden_size is None else table | NORMED_MLP


OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    qk_norm=True,
    wide_qk_norm=True,
    pre_norms=False,
    post_norms=True,
    rope_types={"default": "default"},  # no OLMo 2 has another, and transformers 4 takes few spellings
    layer_table=_layer_table,
    write_own=lambda model: {"pad_token_id": None},  # else 1, whatever the tokenizer
)
